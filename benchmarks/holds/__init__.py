"""The problems on which a forecast is compared with training."""
