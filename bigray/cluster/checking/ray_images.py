"""The containers of a `ray up` file: images that are pinned, of this Ray, and have CUDA where there are GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bigray.cluster.checking.faults import Fault, Path
from bigray.cluster.checking.ray_cluster import at, is_head, mapping, node_types
from bigray.cluster.checking.versions import image_fault, parse_image
from bigray.cluster.checking.yaml_file import Document


def check_containers(document: Document) -> Iterator[Fault]:
    """Images: pinned, of this Ray, with CUDA where there are GPUs; and a container's way out."""
    docker = mapping(document.value.get("docker"))
    images: list[Path] = [("docker", key) for key in ("image", "head_image", "worker_image")]
    images += [("available_node_types", name, "docker", "worker_image") for name in node_types(document)]
    for path in images:
        image = at(document.value, path)
        if isinstance(image, str):
            if fault := image_fault(image):
                yield document.fault(path, fault)
            elif path != ("docker", "head_image"):
                yield from _cuda_faults(document, path, image)
    has_image = "image" in docker or {"head_image", "worker_image"} <= set(docker)
    if docker and has_image and "container_name" not in docker:
        yield document.fault(("docker",), "'container_name' is required with an image, but missing")
    elif docker and not has_image and "container_name" in docker:
        yield document.fault(("docker",), "'image' is required with container_name, but missing")
    for key in ("run_options", "head_run_options", "worker_run_options"):
        for index, option in enumerate(docker.get(key) or ()):
            if message := _run_option_fault(str(option)):
                yield document.fault(("docker", key, index), message)


def _cuda_faults(document: Document, path: Path, image: str) -> Iterator[Fault]:
    """A Ray image without CUDA for a node type with GPUs that takes its image from `path`."""
    parsed = parse_image(image)
    if parsed.ray is None or parsed.has_cuda or not parsed.repository.startswith("rayproject/"):
        return
    for name, node_type in node_types(document).items():
        own = at(node_type, ("docker", "worker_image"))
        general = at(document.value, ("docker", "worker_image"))
        takes = path[1] == name if path[0] != "docker" else not own and (path[-1] == "worker_image" or not general)
        if takes and mapping(mapping(node_type).get("resources")).get("GPU") and not is_head(document, name):
            yield document.fault(path, f"{image!r} is without CUDA, and {name} has GPUs; use a tag that ends with -gpu")
            return


def _run_option_fault(option: str) -> str | None:
    if re.search(r"--privileged\b", option):
        return "--privileged gives the container the whole machine; leave it out"
    if "docker.sock" in option:
        return "docker.sock gives the container the whole machine; leave it out"
    if re.search(r"(^|\s)(-p|--publish)\b", option):
        return "publishes a port; containers use the machine's network, so leave it out"
    if re.search(r"(^|\s)(-v|--volume|--mount)\b.*(\.aws|\.ssh|\.config/gcloud)\b", option):
        return "hands keys of the machine to the container; give the machine a role instead"
    return None
