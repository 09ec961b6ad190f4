"""dtrain for Spack 1.0 or later; it builds the clone in which this file lies.

spack repo add recipes/spack/spack_repo/dtrain
spack install py-dtrain
"""

from pathlib import Path

from spack.package import depends_on, license, variant, version
from spack_repo.builtin.build_systems.python import PythonPackage

CLONE = Path(__file__).resolve().parents[6]


class PyDtrain(PythonPackage):
    """Training of PyTorch models on MPI ranks, layer-parallel and data-parallel."""

    homepage = f"file://{CLONE}"
    git = f"file://{CLONE}"

    license("BSD-3-Clause")

    version("main", branch="main")

    variant("demo", default=True, description="The digits of scikit-learn, for the demo")
    variant("export", default=True, description="Weights as .safetensors")
    variant("images", default=True, description="Import of image folders")
    variant("report", default=True, description="Reports, plots, and job scripts")
    variant("terminal", default=True, description="A progress display")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@70.1:", type="build")
    depends_on("py-h5py", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("py-numpy", type=("build", "run"))
    depends_on("py-torch@2.4:", type=("build", "run"))
    depends_on("py-xxhash", type=("build", "run"))
    depends_on("py-scikit-learn", when="+demo", type="run")
    depends_on("py-safetensors", when="+export", type="run")
    depends_on("py-pillow", when="+images", type="run")
    depends_on("py-jinja2", when="+report", type="run")
    depends_on("py-matplotlib", when="+report", type="run")
    depends_on("py-rich", when="+terminal", type="run")
