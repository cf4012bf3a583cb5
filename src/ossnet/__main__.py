"""`python -m ossnet`."""

from ossnet.cli.main import run

if __name__ == "__main__":
    run()
