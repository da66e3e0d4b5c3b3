"""`python -m shardtrain`."""

from shardtrain.cli.command import main

if __name__ == "__main__":
    main()
