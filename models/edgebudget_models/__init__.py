"""The zoo: definitions, weights, data and training recipes. Imports nothing of edgebudget."""
