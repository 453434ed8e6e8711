"""The problems on which a recommended warmup is compared with training without a warmup."""
