"""The paper's figures, one file each: settings in, a pure run, a labeled result out.

`catalogue` has them by name, as `lazyjax reproduce` takes them; or import the file you want, for example
`from lazyjax.experiments import fig1c_student_scale as student_scale`. Nothing here draws or prints; `lazyjax.plot` turns a result into a
figure.
"""
