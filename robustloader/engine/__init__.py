"""The training process's side: iterators, the pool of workers, faults as the trainer meets them, pinning."""
