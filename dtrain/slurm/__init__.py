"""Slurm: profiles of sites, job scripts made from them, and their submission."""
