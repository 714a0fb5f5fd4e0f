"""Runs the pods of built manifests as processes of this machine, as a kubelet does, without an API server.

Each pod gets an address of its own on the loopback interface, its volumes at their paths, a root file system
that is read-only, and the user of its security context. Init containers run first. A container starts with
the command of the manifest in which `$(VARIABLE)`s are replaced. Probes are HTTP requests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).parents[2]
_FILES = tuple(f"/etc/{name}" for name in ("ld.so.cache", "nsswitch.conf", "passwd", "group", "localtime"))
"""What programs of a Debian image read."""


class Cluster:
    """Volumes that outlive pods, and names of pods. `secrets`, `config_maps`: name -> key -> content."""

    def __init__(
        self, directory: Path, *, secrets: Mapping[str, Mapping[str, bytes]], config_maps: Mapping[str, Any]
    ) -> None:
        self.directory = directory
        self.secrets = secrets
        self.config_maps = config_maps
        self.hosts = directory / "hosts"
        self._addresses: dict[str, str] = {}
        self._num_pods = 0
        self._write_hosts()

    def new_address(self, name: str) -> str:
        """Another address on the loopback interface, which `name` means from now on."""
        self._num_pods += 1
        address = f"127.0.7.{self._num_pods}"
        self._addresses[name] = address
        self._write_hosts()
        return address

    def _write_hosts(self) -> None:
        # In place: running pods have this file mounted.
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._addresses.items())]
        self.hosts.write_text("\n".join(lines) + "\n")


class Pod:
    """One pod of a workload's template."""

    def __init__(
        self, cluster: Cluster, workload: Mapping[str, Any], *, name: str, host_name: str, index: int = 0
    ) -> None:
        """`host_name`: by which other pods find this one. `index`: of a pod of an indexed Job."""
        self.name = name
        self.address = cluster.new_address(host_name)
        self._cluster = cluster
        self._spec = workload["spec"]["template"]["spec"]
        self._claims = {
            claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])
        }
        self._index = index
        self._directory = cluster.directory / "pods" / name
        shutil.rmtree(self._directory, ignore_errors=True)  # of an earlier pod of a StatefulSet
        self._directory.mkdir(parents=True)
        self._volumes = {volume["name"]: self._made(volume) for volume in self._spec["volumes"]}
        for claim in self._claims:
            self._volumes[claim] = cluster.directory / "claims" / claim
            self._volumes[claim].mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Runs the init containers, then starts the container."""
        for container in self._spec["initContainers"]:
            with self._log(container["name"]).open("wb") as log:
                subprocess.run(self._command(container), stdout=log, stderr=log, check=True, timeout=120)
        (container,) = self._spec["containers"]
        with self._log(container["name"]).open("wb") as log:
            self.process = subprocess.Popen(self._command(container), stdout=log, stderr=log)

    def output(self) -> str:
        """What the container has written."""
        (container,) = self._spec["containers"]
        return self._log(container["name"]).read_text()

    def probe(self, kind: str, *, path: str = "", host: str = "") -> int:
        """The HTTP status that a probe gets; 0 if nothing answers.

        `path`: instead of the probe's; `host`: the Host header, as of a request that is forwarded.
        """
        (container,) = self._spec["containers"]
        request = container[kind]["httpGet"]
        port = next(port["containerPort"] for port in container["ports"] if port["name"] == request["port"])
        try:
            url = f"http://{self.address}:{port}{path or request['path']}"
            asked = urllib.request.Request(url, headers={"Host": host} if host else {})
            with urllib.request.urlopen(asked, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def delete(self) -> int:
        """SIGTERM; returns the exit code of the container, which has to end within its grace period."""
        assert self.process is not None
        self._daemon_gets(signal.SIGTERM)
        return self.process.wait(timeout=self._spec["terminationGracePeriodSeconds"])

    def kill(self) -> None:
        """SIGKILL, as when its node is lost."""
        assert self.process is not None
        self.process.kill()  # bwrap takes everything in its namespace with it
        self.process.wait(timeout=10)

    def _daemon_gets(self, number: int) -> None:
        # bwrap is the first process in the namespace of the container and does not pass signals on.
        assert self.process is not None
        pid = self.process.pid
        for _ in range(2):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[0])
        os.kill(pid, number)

    def _log(self, container: str) -> Path:
        return self._directory / f"{container}.log"

    def _made(self, volume: Mapping[str, Any]) -> Path:
        """The directory of a volume."""
        if "persistentVolumeClaim" in volume:
            path = self._cluster.directory / "claims" / volume["persistentVolumeClaim"]["claimName"]
        else:
            path = self._directory / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        if secret := volume.get("secret"):
            for item in secret["items"]:
                file = path / item["path"]
                file.write_bytes(self._cluster.secrets[secret["secretName"]][item["key"]])
                file.chmod(secret["defaultMode"])
        if config_map := volume.get("configMap"):
            for key, text in self._cluster.config_maps[config_map["name"]].items():
                (path / key).write_text(text)
        return path

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        fields = {
            "status.podIP": self.address,
            "metadata.name": self.name,
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(self._index),
        }
        return {
            entry["name"]: entry["value"]
            if "value" in entry
            else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            for entry in container.get("env", [])
        }

    def _command(self, container: Mapping[str, Any]) -> list[str]:
        """The container's command in a sandbox of bubblewrap."""
        environment = self._environment(container)
        words = [
            re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in container["command"]
        ]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        user = self._spec["securityContext"]
        sandbox = ["bwrap", "--unshare-user", "--unshare-pid", "--die-with-parent", "--clearenv"]
        sandbox += ["--uid", str(user["runAsUser"]), "--gid", str(user["runAsGroup"])]
        for top in ("/usr", "/opt", *_FILES):
            sandbox += ["--ro-bind-try", top, top]
        for link in (path for path in Path("/").iterdir() if path.is_symlink()):  # /bin, /lib, ...
            sandbox += ["--symlink", str(link.readlink()), str(link)]
        sandbox += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(self._cluster.hosts), "/etc/hosts"]
        for base in {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), _PROJECT}:
            sandbox += ["--ro-bind", str(base), str(base)]
        for mount in container["volumeMounts"]:
            sandbox += ["--bind", str(self._volumes[mount["name"]]), mount["mountPath"]]
        # What the image sets.
        image = {
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(_PROJECT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name, value in (image | environment).items():
            sandbox += ["--setenv", name, value]
        return [*sandbox, "--remount-ro", "/", "--chdir", "/", *words]
