"""Model families behind one small interface; ``sd3`` is the first."""
