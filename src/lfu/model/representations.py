"""Reading h[l, t] (Eq. 3 and 4): hooks on the blocks, the answer positions, and a forward that stops in time.

Hooks, because TRL's fused LM head returns no hidden states. Only the answer tokens are kept: N x d a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lfu.model.anatomy import Anatomy

# what the loss needs and the decoder does not
LOSS_ONLY = ("labels", "num_items_in_batch", "shift_labels")


class _Stop(Exception):
    """Raised by the hook on the last compared layer: nothing after it is needed."""


def answer_positions(labels: torch.Tensor, which: str = "predict") -> torch.Tensor:
    """Flat indices `(N,)` into the positions of a batch with these labels `(B, T)` whose representations are compared.

    `predict`: the positions that predict an answer token, t-1 for the label at t (paper: h[l,t] = M(x, y_<t)).
    `answer`: the answer tokens' own positions (the authors' code). Both have the N of the loss's mean.
    """
    labelled = labels != -100
    labelled[:, 0] = False  # never predicted
    if which == "predict":
        labelled = labelled.roll(-1, dims=1)
    return labelled.flatten().nonzero().squeeze(1)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states `(B, T, d)` in what a block or a decoder returns."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """The same block output with other hidden states."""
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


@contextmanager
def forward_hooks(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]], with_kwargs: bool = False) -> Iterator[None]:
    """Install forward hooks, and take them off whatever happens. `with_kwargs` as in `register_forward_hook`."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield


class Reader:
    """Reads the representations of chosen `layers`, in 1..K and ascending, at the answer positions.

    With `final_norm` layer K is read after the final norm, as transformers' hidden_states[K] is.
    """

    def __init__(self, anatomy: Anatomy, layers: list[int], final_norm: bool = True):
        self.anatomy, self.layers, self.final_norm = anatomy, layers, final_norm
        depth = len(anatomy.blocks)
        self.sources: dict[int, nn.Module] = {layer: anatomy.blocks[layer - 1] for layer in layers}
        if final_norm and depth in self.sources:
            self.sources[depth] = anatomy.final

    @contextmanager
    def reading(
        self,
        positions: torch.Tensor,
        *,
        detach: bool,
        stop: bool = False,
        visit: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Within it, a forward fills the yielded dict: layer -> `(N, d)`, in the dtype of the hidden states.

        With `stop`, the forward ends (see `run`) after the last compared layer. Gradient checkpointing may run a
        block again during the backward: what was read first stays. `visit` is told layer, `(B, T, d)` hidden states
        in the graph, and what was read of them.
        """
        found: dict[int, torch.Tensor] = {}

        def hook(layer: int):
            def read_layer(module: nn.Module, args: Any, output: Any) -> None:
                if layer in found:
                    return
                hidden = hidden_of(output)
                read = hidden.detach() if detach else hidden
                # A checkpoint round the whole block (FSDP2's) runs this hook too, in the forward but not again in the
                # recompute, and compares how many tensors were saved: here autograd keeps them by itself.
                with saved_tensors_hooks(lambda t: t, lambda t: t):
                    found[layer] = read.flatten(0, 1).index_select(0, positions.to(hidden.device))
                    if visit is not None:
                        visit(layer, hidden, found[layer])
                # PEFT's wrapper must clean up after itself
                if stop and layer == self.layers[-1] and self.anatomy.wrapper is None:
                    raise _Stop

            return read_layer

        with forward_hooks([(source, hook(layer)) for layer, source in self.sources.items()]):
            yield found

    def run(self, batch: Mapping[str, Any], call: Callable[..., Any] | None = None) -> None:
        """One forward, or `call` in its place, up to the last layer that a `reading(stop=True)` wants."""
        inputs = {name: value for name, value in batch.items() if name not in LOSS_ONLY}
        with self._grounded(), suppress(_Stop):
            (call or self.anatomy.forward)(**{**inputs, "use_cache": False})

    @contextmanager
    def _grounded(self) -> Iterator[None]:
        """Cuts the graph at the embeddings where they hold no theta, so that the backward ends at theta's lowest layer.

        Gradient checkpointing with PEFT makes their output require a gradient, for the sake of the reentrant form.
        """
        try:
            embedding = self.anatomy.model.get_input_embeddings()
        except NotImplementedError:  # an architecture of one's own: its backward is longer, no more
            embedding = None
        steered = self.anatomy.wrapper is not None  # aLoRA's hooks for checkpointing need blocks with a gradient below
        cut = not (embedding is None or steered or any(p.requires_grad for p in embedding.parameters()))
        with forward_hooks([(embedding, lambda module, args, output: output.detach())] if cut else []):
            yield
