"""The inner methods of :mod:`xai_fast.influence.solvers`, one file each, and the refinement around them."""
