"""Factorization: matrices as products of smaller ones."""
