"""Doctor: find what is wrong with MPI, the node, the run folder and the network, and the cure.

Invariant: a check is a function of facts (environment, outputs of programs, measurements) and
returns findings as data. It repairs nothing, and a hanging MPI library is a finding, not a hang.

::

    this process is no rank              this process is one of several ranks
    probe (a subprocess starts MPI)      ranks: start MPI under a time limit
      |                                    |
      +-- mpi, launch, node, files         +-- mpi, launch, node, files, clocks, network -> advice
"""
