"""Floor 2: many processes. The only place, with `checkpoint/run_state`, that may say torch.distributed."""
