"""One manifest file: what it may hold, and what is said of one that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kube_router.ipc.messages import Node, NodeAddress, Pod
from kube_router.workers.watcher.manifestfile import MAX_DEPTH, MAX_FILE_BYTES, BadManifest, parse_manifest

NODE = """\
apiVersion: v1
kind: Node
metadata:
  name: n1
  annotations: {kube-router.io/node.bgp.communities: 64512:10, kube-router.io/since: 2026-01-01}
spec:
  podCIDRs: [10.1.0.0/24, "fd00:1::/64"]
status:
  addresses:
  - {type: InternalIP, address: 192.0.2.1}
  - {type: InternalIP, address: 2001:db8::1}
"""


def keys(text: str) -> list[str]:
    content = parse_manifest(text.encode())
    assert not content.broken
    return [f"{kind} {item.key}" for kind, item in content.objects]


def test_scalars_mean_what_they_mean_to_kubectl() -> None:
    [(kind, item)] = parse_manifest(NODE.encode()).objects
    assert kind == "nodes"
    assert item == Node(
        name="n1",
        annotations={"kube-router.io/node.bgp.communities": "64512:10", "kube-router.io/since": "2026-01-01"},
        pod_cidrs=("10.1.0.0/24", "fd00:1::/64"),
        addresses=(NodeAddress("InternalIP", "192.0.2.1"), NodeAddress("InternalIP", "2001:db8::1")),
    )


def test_multiple_documents_lists_and_other_kinds() -> None:
    text = f"""\
# a comment
---
{NODE}
---
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: d}}
---
apiVersion: v1
kind: List
items:
- {{apiVersion: v1, kind: Namespace, metadata: {{name: a}}}}
- apiVersion: v1
  kind: List
  items:
  - {{apiVersion: v1, kind: Pod, metadata: {{name: p}}}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicyList
items:
- {{metadata: {{name: np, namespace: x}}}}
---
apiVersion: crd.projectcalico.org/v1
kind: NetworkPolicy
metadata: {{name: not-ours}}
...
"""
    assert keys(text) == ["nodes n1", "namespaces a", "pods default/p", "networkpolicies x/np"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "\ufeff---\n", "apiVersion: v1\nkind: List\n"])
def test_empty_files_are_fine(text: str) -> None:
    assert keys(text) == []


def test_json_with_tabs_and_a_byte_order_mark() -> None:
    node: dict[str, Any] = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "j"}}
    assert keys("\ufeff" + json.dumps(node, indent="\t")) == ["nodes j"]


def test_finished_pods_are_left_out_as_the_api_server_leaves_them_out() -> None:
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p%d}\nstatus: {phase: %s}\n---\n"
    content = parse_manifest("".join(pod % pair for pair in enumerate(("Running", "Succeeded", "Failed"))).encode())
    assert [item for _, item in content.objects] == [Pod(name="p0", namespace="default", phase="Running")]


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "syntax": (b"apiVersion: v1\nkind: Node\nmetadata:\n  name: [\n", "line 5: did not find expected node content"),
    "tab": (b"a:\n\tb: c\n", "line 2: found character that cannot start any token"),
    "binary": (b"\x7fELF\x00\x01", "control characters are not allowed"),
    "not UTF-8": (b"a: b\nc: \xff\n", "line 2: not UTF-8"),
    "no object": (b"- a\n- b\n", "line 1: not a Kubernetes object: no kind"),
    "text": (b"hello\n", "line 1: not a Kubernetes object: no kind"),
    "no kind": (b"---\na: b\n", "line 2: not a Kubernetes object: no kind"),
    "kind of a wrong type": (b"kind: 3\n", "line 1: not a Kubernetes object: no kind"),
    "items": (b"kind: List\nitems: 3\n", "line 1: List: items is not a list"),
    "item": (b"kind: List\nitems: [3]\n", "line 1, items[0]: not a Kubernetes object: no kind"),
    "alias": (b"a: &x [1]\nb:\n- *x\n", "line 3: alias *x (aliases are not accepted)"),
    "merge": (b"a: &x {b: c}\nd:\n  <<: *x\n", "line 3: alias *x (aliases are not accepted)"),
    "itself": (b"&x [*x]\n", "line 1: alias *x (aliases are not accepted)"),
    "python": (b"a: !!python/object/apply:os.system [id]\n", "line 1: could not determine a constructor"),
    "key": (b"{[a]: b}\n", "line 1: found unhashable key"),
    "undefined alias": (b"a: *x\n", "line 1: alias *x"),
    "directive": (b"%YAML 9.9\n---\na: b\n", "line 1"),
    "flow depth": (b"[" * 1_000_000, f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "map depth": (b"{a: " * 300_000, f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "sequence depth": (b"- " * 100_000 + b"x", f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "key depth": (b"? " * 100_000 + b"x", f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "block depth": (b"".join(b" " * n + b"a:\n" for n in range(5000)), f"line 101: nested deeper than {MAX_DEPTH}"),
    "long": (b" " * (MAX_FILE_BYTES + 1), "more than 16 MiB"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_the_line(name: str) -> None:
    data, text = BAD_FILES[name]
    with pytest.raises(BadManifest) as caught:
        parse_manifest(data)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(BadManifest, match=r"line 2: alias \*a0"):
        parse_manifest("\n".join(lines).encode())


def test_an_asterisk_in_a_value_is_no_alias() -> None:
    assert keys("apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {a: '*', b: \"x * y\"}}\n") == ["nodes n"]


BAD_OBJECTS: dict[str, tuple[str, str, str]] = {
    "annotation": (
        "metadata: {name: n, annotations: {a: b, kube-router.io/node.asn: 64512}}",
        "n",
        "line 1: Node n: $.metadata.annotations['kube-router.io/node.asn']: Expected `str`, got `int`",
    ),
    "list": (
        "metadata: {name: n}\nspec: {podCIDRs: 10.1.0.0/24}",
        "n",
        "line 1: Node n: $.spec.podCIDRs: Expected `array | null`, got `str`",
    ),
    "deep": (
        "metadata: {name: n}\nstatus: {addresses: [{type: InternalIP, address: [x]}]}",
        "n",
        "line 1: Node n: $.status.addresses[0].address: Expected `str | null`, got `array`",
    ),
    "metadata": ("metadata: 3", "", "line 1: Node ?: $.metadata: Expected `object`, got `int`"),
    "no metadata": ("spec: {}", "", "line 1: Node ?: Object missing required field `metadata`"),
    "no name": ("metadata: {labels: {}}", "", "line 1: Node ?: $.metadata.name: '' is not an object name"),
    "slash": ("metadata: {name: a/b}", "a/b", "line 1: Node a/b: $.metadata.name: 'a/b' is not an object name"),
    "version": ("apiVersion: v9\nmetadata: {name: n}", "n", "line 1: Node n: apiVersion 'v9' is not v1"),
    "no version": ("apiVersion:\nmetadata: {name: n}", "n", "line 1: Node n: apiVersion None is not v1"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_bad_object_names_object_and_path_and_leaves_the_others(name: str) -> None:
    text, key, complaint = BAD_OBJECTS[name]
    version = "" if "apiVersion" in text else "apiVersion: v1\n"
    content = parse_manifest(f"kind: Node\n{version}{text}\n---\n{NODE}".encode())
    assert [item.key for _, item in content.objects] == ["n1"]
    assert [(broken.kind, broken.key, broken.text) for broken in content.broken] == [("nodes", key, complaint)]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_bad_manifest(data: bytes) -> None:
    try:
        parse_manifest(data)
    except BadManifest as error:
        assert str(error)


@given(st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#, \n\t", max_size=120))
def test_any_yaml_like_text_is_a_manifest_or_a_bad_manifest(text: str) -> None:
    try:
        parse_manifest(text.encode())
    except BadManifest as error:
        assert str(error)
