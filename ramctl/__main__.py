"""``python -m ramctl``, the form that ``accelerate launch -m ramctl`` and ``torchrun -m ramctl`` use."""

from ramctl.cli.app import main

if __name__ == "__main__":
    main()
