"""What the user types: one thin module per subcommand, each with a ``register(app)``; see ``app.py``."""
