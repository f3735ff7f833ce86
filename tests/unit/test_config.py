"""Settings: every limit can be wrong, and whoever set it is told which one."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from coordinator.config import (
    MAX_NAME,
    Compatibility,
    ConfigError,
    Limits,
    NodeConfig,
    Peer,
    Timing,
    is_loopback,
    split_address,
    valid_name,
)
from coordinator.levels import NEWEST

SECRET = "0123456789abcdef"


def peer(number):
    return Peer(id=f"n{number}", api=f"127.0.0.1:{7000 + number}", raft=f"127.0.0.1:{8000 + number}")


THREE = (peer(1), peer(2), peer(3))
GOOD = NodeConfig(cluster="m", node="n1", data=Path("data"), nodes=THREE, secret=SECRET)

TOML = """
cluster = "shop"
node = "n2"
data = "state"
secret = "0123456789abcdef"

[[nodes]]
id = "n1"
api = "127.0.0.1:7001"
raft = "127.0.0.1:8001"

[[nodes]]
id = "n2"
api = "127.0.0.1:7002"
raft = "127.0.0.1:8002"

[[nodes]]
id = "n3"
api = "127.0.0.1:7003"
raft = "127.0.0.1:8003"

[limits]
max_branches = 8

[timing]
backoff_min_s = 1

[compatibility]
highest_level = 1
"""


def test_a_file_is_read_and_the_rest_has_defaults(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(TOML)
    config = NodeConfig.load(path)
    assert (config.cluster, config.me.id, config.me.url) == ("shop", "n2", "http://127.0.0.1:7002")
    assert config.data == tmp_path / "state", "counted from the file's folder"
    assert config.limits == Limits(max_branches=8)
    assert config.timing == Timing(backoff_min_s=1)
    assert config.compatibility.announced == 1


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('cluster = "shop"', "", "lacks cluster"),
        ('cluster = "shop"', "cluster = 5", "cluster in the file must be of type str"),
        ('cluster = "shop"', 'cluster = "shop"\nclutser = "x"', "no setting 'clutser'"),
        ('data = "state"', "data = 5", "data must name a folder"),
        ('data = "state"', "", "data must name a folder"),
        ("max_branches = 8", "max_branches = true", "max_branches in limits must be of type int"),
        ("max_branches = 8", "max_branches = 8.0", "max_branches in limits must be of type int"),
        ("max_branches = 8", "max_branches = 0", "limits.max_branches must be positive"),
        ("max_branches = 8", "branches = 8", "limits has no setting 'branches'"),
        ("backoff_min_s = 1", 'backoff_min_s = "1"', "backoff_min_s in timing must be of type float"),
        ("[timing]", "[timings]", "no setting 'timings'"),
        ("[limits]\nmax_branches = 8", "", None),
        ('id = "n3"', "", "nodes lacks id"),
        ('id = "n3"', 'id = "n2"', "two nodes have one id"),
        ('node = "n2"', 'node = "n9"', "node 'n9' is not among nodes: n1, n2, n3"),
        ('node = "n2"', 'node = "n2', "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_setting(tmp_path, before, after, complaint):
    assert before in TOML
    path = tmp_path / "node.toml"
    path.write_text(TOML.replace(before, after))
    if complaint is None:
        NodeConfig.load(path)
        return
    with pytest.raises(ConfigError) as caught:
        NodeConfig.load(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_told_of_in_words(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        NodeConfig.load(tmp_path / "none.toml")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'cluster = "\xe9"')
    with pytest.raises(ConfigError, match="is not TOML"):
        NodeConfig.load(latin)


@pytest.mark.parametrize("nodes", [None, [], "n1", [5], [{}], [{"id": "n1"}]])
def test_nodes_must_be_tables(nodes):
    with pytest.raises(ConfigError, match="nodes"):
        NodeConfig.of({"nodes": nodes}, base=Path())


def test_a_node_announces_what_it_understands_and_no_more_than_it_is_told_to():
    assert Compatibility().announced == Compatibility(highest_level=NEWEST + 1).announced == NEWEST
    with pytest.raises(ConfigError, match="highest_level must be at least 1"):
        Compatibility(highest_level=0)


@pytest.mark.parametrize("section", ["limits", "timing", "compatibility"])
def test_sections_must_be_tables(section):
    nodes = [{"id": "n1", "api": "127.0.0.1:1", "raft": "127.0.0.1:2"}]
    with pytest.raises(ConfigError, match=f"{section} must be a table"):
        NodeConfig.of({"nodes": nodes, section: 5}, base=Path())


@pytest.mark.parametrize("kind", [Limits, Timing])
def test_no_limit_may_be_zero_or_less(kind):
    for item in fields(kind):
        for value in (0, -1):
            with pytest.raises(ConfigError, match=f"{item.name} must be positive"):
                kind(**{item.name: value})


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: Limits(default_timeout_s=301), "default_timeout_s exceeds max_timeout_s"),
        (lambda: Limits(retention_s=899), "retention_s must be at least 900"),
        (lambda: Limits(max_payload_bytes=2 << 20), "max_payload_bytes exceeds max_body_bytes"),
        (lambda: Limits(max_body_bytes=4 << 20), "max_body_bytes exceeds max_command_bytes"),
        (lambda: Limits(max_in_flight=3_000_000), "max_in_flight exceeds max_retained"),
        (lambda: Timing(backoff_min_s=2.1), "backoff_min_s exceeds backoff_max_s"),
        (lambda: Timing(backoff_max_s=2.1), "backoff_max_s must be at most 2"),
        (lambda: Timing(proposal_timeout_s=3), "proposal_timeout_s must be below 3"),
        (lambda: replace(GOOD, cluster="Shop"), "cluster must be"),
        (lambda: replace(GOOD, cluster="x" * 25), "cluster must be at most 24"),
        (lambda: replace(GOOD, nodes=THREE[:2]), "an even number"),
        (lambda: replace(GOOD, nodes=(*THREE[:2], replace(THREE[2], raft=THREE[0].api))), "share an address"),
        (lambda: replace(GOOD, nodes=(replace(THREE[0], raft=THREE[0].api), *THREE[1:])), "share an address"),
        (lambda: replace(GOOD, secret="short"), "secret must have at least 16"),
        (lambda: replace(GOOD, token="short"), "token must have at least 16"),
        (lambda: replace(GOOD, participant_token="short"), "participant_token must have at least 16"),
        (lambda: replace(GOOD, nodes=(replace(THREE[0], api="10.0.0.1:7001"), *THREE[1:])), "not on loopback"),
        (lambda: replace(GOOD, nodes=(replace(THREE[0], raft="0.0.0.0:8001"), *THREE[1:])), "not on loopback"),
        (lambda: Peer(id="N1", api="a:1", raft="a:2"), "cannot be called 'N1'"),
        (lambda: Peer(id="n1", api="a", raft="a:2"), "api of node n1 must be host:port"),
        (lambda: Peer(id="n1", api="a:1", raft="a:0"), "raft of node n1 must be host:port"),
    ],
)
def test_relations_between_settings_are_checked_where_they_are_set(build, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build()


def test_secrets_are_not_shown():
    config = replace(GOOD, token="t" * 16, participant_token="p" * 16)
    assert SECRET not in repr(config)
    assert "t" * 16 not in repr(config)
    assert "p" * 16 not in repr(config)


def test_peers_are_found_by_id():
    assert GOOD.peer("n3") is THREE[2]
    with pytest.raises(KeyError):
        GOOD.peer("n9")


def test_one_node_alone_is_a_cluster():
    assert replace(GOOD, nodes=THREE[:1]).me is THREE[0]


@pytest.mark.parametrize("name", ["a", "shop", "n1", "a-b", "a1-2b", "x" * MAX_NAME])
def test_names(name):
    assert valid_name(name)


@pytest.mark.parametrize("name", ["", "1a", "-a", "a-", "A", "a_b", "a b", "é", "a\n", "x" * (MAX_NAME + 1)])
def test_what_is_no_name(name):
    assert not valid_name(name)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:65535", ("::1", 65535)), ("localhost:80", ("localhost", 80))],
)
def test_addresses(address, expected):
    assert split_address(address, "it") == expected


@pytest.mark.parametrize(
    "address", ["", ":", "host", "host:", ":1", "host:0", "host:65536", "host:-1", "host:x", "host:¹"]
)
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="it must be host:port"):
        split_address(address, "it")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected
