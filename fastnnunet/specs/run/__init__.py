"""How a model runs that was asked for once and predicts many images."""
