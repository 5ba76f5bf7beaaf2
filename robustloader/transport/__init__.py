"""How messages and batches cross between the training process and its workers: frames in, batch out."""
