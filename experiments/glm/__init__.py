"""AdaGram on generalized linear models, beside SGD, AdaGrad and Shampoo."""
