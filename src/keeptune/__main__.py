"""``python -m keeptune``, as launchers start it."""

from keeptune.cli.main import main

if __name__ == "__main__":
    main()
