"Everything about the package is said once, in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]
status = ["Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive"][int(cfg["status"]) - 1]
source, docs = cfg["git_url"], cfg["doc_host"] + cfg["doc_baseurl"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    license="Apache-2.0", author=cfg["author"], author_email=cfg["author_email"],
    project_urls={"Homepage": docs, "Documentation": docs, "Source": source, "Issues": f"{source}/issues",
                  "Changelog": f"{source}/blob/{cfg['branch']}/CHANGELOG.md"},
    classifiers=[f"Development Status :: {cfg['status']} - {status}", "Intended Audience :: Science/Research",
                 *(f"Programming Language :: Python :: {v}" for v in ("3", "3.10", "3.11", "3.12", "3.13"))],
    packages=find_packages(include=["basd", "basd.*"]), py_modules=["basd_distill"],
    package_data={"basd": ["*.mplstyle", "*.json", "recipes/*.yaml", "recipes/*/*.yaml", "py.typed", "*.pyi", "*/*.pyi"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split(), "onnx": ["onnx", "onnxscript", "onnxruntime"], "completion": ["shtab"], "streams": ["webdataset", "datasets>=4"],
                                                             "tensorboard": ["tensorboard"], "trackio": ["trackio"], "wandb": ["wandb"], "mlflow": ["mlflow"],
                                                             "guides": ["lightning-fabric>=2.5", "transformers>=5", "accelerate>=1.10"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["basd=basd._modidx:d"]},
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown", zip_safe=False,
)
