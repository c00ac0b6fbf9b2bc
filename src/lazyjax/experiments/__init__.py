"""The paper's figures, one file each: settings in, a pure run on a key, a frozen result out.

Import the file you want, for example `from lazyjax.experiments import limit_kernel`. Nothing here draws or writes;
`lazyjax.plot` turns a result into a figure.
"""
