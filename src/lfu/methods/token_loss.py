"""What the methods share that replace the loss of each token."""

import torch

from lfu.methods.method import Method
from lfu.methods.run import Batch
from lfu.methods.tokens import nll_of


class TokenLoss(Method):
    """`l = (1/N) sum_t l_t` over the N answer tokens."""

    places = ("token loss",)
    whole_weights = True

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        return batch.mean(self.of_tokens(batch))

    def of_tokens(self, batch: Batch) -> torch.Tensor:
        """l_t: `(N,)`, in the graph."""
        raise NotImplementedError


class WeightedLoss(TokenLoss):
    """`l_t = w_t * (- log p(y_t | x, y_<t))`; w_t is held constant."""

    def of_tokens(self, batch: Batch) -> torch.Tensor:
        nll = batch.per_token(nll_of)
        weight = self.weights(nll.detach(), batch)
        batch.log_mean(f"{self.name}/weight", batch.mean(weight))
        return weight * nll

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        """w `(N,)` of the tokens whose loss is `nll` `(N,)`, in float32 or wider."""
        raise NotImplementedError
