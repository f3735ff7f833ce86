"""`outlast certs`: a cluster's own authority, its certificates, and what to put where."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cluster.certificates import Authority, CertificateTrouble, Kind, Wanted, check_room, make_secret
from cluster.cli import FAILED, OK, complain, print_json


def certs(arguments: argparse.Namespace) -> int:
    """Make them."""
    folder: Path = arguments.folder
    try:
        made_authority, authority, files, token = _make(arguments, folder)
    except CertificateTrouble as error:
        return complain(error, FAILED)
    if arguments.json:
        print_json(
            {
                "cluster": authority.cluster,
                "ca": str(authority.file),
                "token_file": None if token is None else str(token),
                "certificates": [{"certificate": str(file), "key": str(file.with_suffix(".key"))} for file in files],
            }
        )
    else:
        _explain(arguments, authority, files, token, made_authority=made_authority)
    return OK


def _make(arguments: argparse.Namespace, folder: Path) -> tuple[bool, Authority, list[Path], Path | None]:
    wanted = [
        *(_wanted(Kind.NODE, text) for text in (*arguments.node, *arguments.add_node)),
        *(_wanted(Kind.CLIENT, text) for text in arguments.client),
        *(_wanted(Kind.PARTICIPANT, text) for text in arguments.participant),
    ]
    if not wanted:
        raise CertificateTrouble("say for whom: --node n1=host,address, --client NAME, --participant NAME=host")
    makes = not Authority.there(folder)
    if makes and (arguments.cluster is None or not arguments.node):
        raise CertificateTrouble(
            f"{folder} holds no authority; one is made with the cluster's name and nodes: --cluster NAME --node n1=host"
        )
    check_room(folder, wanted, renew=arguments.renew)
    authority = Authority.make(folder, arguments.cluster) if makes else Authority.open(folder)
    if arguments.cluster not in (None, authority.cluster):
        raise CertificateTrouble(
            f"{folder} holds the authority of cluster {authority.cluster}, not {arguments.cluster}; use another folder"
        )
    files = authority.issue(wanted, days=arguments.days, renew=arguments.renew)
    for name in (*(("token", "secret") if makes else ()), *(("participant-token",) if arguments.participant else ())):
        make_secret(folder / name)
    token = folder / "token"
    return makes, authority, files, token if token.exists() else None


def _wanted(kind: Kind, text: str) -> Wanted:
    name, _, hosts = text.partition("=")
    return Wanted(kind=kind, name=name, hosts=tuple(host.strip() for host in hosts.split(",") if host.strip()))


def _explain(
    arguments: argparse.Namespace,
    authority: Authority,
    files: Sequence[Path],
    token: Path | None,
    *,
    made_authority: bool,
) -> None:
    folder: Path = arguments.folder
    if made_authority:
        print(f"made the authority of cluster {authority.cluster}: {authority.file}")
        print(f"  keep {folder / 'ca.key'} off the nodes: whoever has it can pretend to be any of them")
    verb = "made, in place of what was there:" if arguments.renew else "made"
    for file in files:
        print(f"{verb} {file} and {file.with_suffix('.key').name}")
    nodes = [text.partition("=")[0] for text in (*arguments.node, *arguments.add_node)]
    if nodes:
        name = nodes[0]
        print("\nOn each node, beside its node.toml: ca.pem, its own .pem and .key, token, secret.")
        print(f"In {name}'s node.toml:\n")
        if token is not None:
            print('token_file = "token"\nsecret_file = "secret"\n')
        print(f'[tls]\nca = "ca.pem"\ncertificate = "{name}.pem"\nkey = "{name}.key"')
        print("\nCommands and clients: outlast tx list --url https://HOST:PORT --ca ca.pem --token-file token")
    if arguments.client:
        print('\nNodes let clients in by certificate if their node.toml says, in [tls]: client_ca = "ca.pem"')
    for text in arguments.participant:
        stem = Kind.PARTICIPANT.file(text.partition("=")[0])
        print(f"\nThe participant's server: --certificate {stem}.pem --key {stem}.key --ca ca.pem \\")
        print("    --token-file token --caller-token-file participant-token")
        print('In every node.toml: participant_token_file = "participant-token", and in [participants]: ca = "ca.pem"')
