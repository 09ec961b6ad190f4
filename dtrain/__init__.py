"""dtrain: data-, pipeline- and layer-parallel local learning over MPI."""
