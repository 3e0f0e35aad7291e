"""Language modelling on packed text: from random weights, or on from checkpoints."""
