"""The commands of the command line, one module each.

Every module has `add`, which describes its commands to argparse. What a command needs is imported when it runs, so that
`neuroada --help` and every other command start quickly.
"""
