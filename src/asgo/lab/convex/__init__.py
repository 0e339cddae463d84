"""Generalized linear models: small convex problems on real data, on which full matrices can be afforded."""
