"""The sub-commands, a module each.

It has add_arguments(parser) and run(args) -> exit code.  It may have EPILOG (more help), FAILURE (its exit code for
errors, if not 1) and split(words) -> words (to take words that look like options, as resize does with -1G, before
they are parsed).

A command calls add_shared() with the letters of the options that it takes, locate() for each image name, and
open_qed(), open_end_point() or open_file() to read or write one: all of them lock it.
"""
