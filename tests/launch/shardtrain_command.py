"""The command `shardtrain`, as a file that a forked process can run."""

from shardtrain.cli.command import main

main()
