"""ramctl: post-train text-to-image models with a reward, by Reinforce Adjoint Matching (arXiv 2605.10759).

Importing this package loads no torch; the modules that need it import it themselves.
"""

__version__ = "0.1.0"
