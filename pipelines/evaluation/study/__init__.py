"""Solvers and numbers of evaluations compared on validation clips, and the choice of one."""
