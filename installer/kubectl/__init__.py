"""`kubectl sidestep …`: the whole cluster, and the agent of any pod's node, from where kubectl runs.

It runs on a user's machine, as one file with its libraries in it, which installer/commands/kubectl_plugin.py makes. So
it imports nothing of the node's side, and asks for nothing but Python and kubectl.
"""
