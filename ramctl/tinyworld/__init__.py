"""The embedded task: drawn scenes and short signs, small enough that every command runs on a laptop's CPU.

``grammar`` says what can be asked for, ``renderer`` draws it, ``detector`` reads it back, ``pretrain`` made the shipped
model. The engine knows none of this: presets name the model and the scorers like any others.
"""
