"""The test bed: models small enough to train from scratch, so that gain and forgetting are known exactly."""
