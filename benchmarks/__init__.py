"""Scripts and their records. A package, so that ``python -m benchmarks.gpu`` finds this folder and no other."""
