"""The structure of the Hessian and the Gauss-Newton matrix of a language model, by their products with vectors."""
