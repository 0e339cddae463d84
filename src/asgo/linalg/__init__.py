"""Functions of batches of matrices: products, decompositions, inverse roots; they know no optimizer."""
