"""Which values look like secrets: those of variables, those of arguments of a config, and what is not one."""

import pytest

from lockstep.core import is_secret

VARIABLES = {
    "HTTPS_PROXY": "http://me:pw@proxy.example:3128",
    "DATABASE_URL": "postgres://host/runs",
    "OPENAI_KEY": "abc",
    "MY_PASSWD": "abc",
    "PGPASSWORD": "abc",
    "MYSQL_PWD": "abc",
    "GITHUB_PAT": "abc",
    "HF_TOKEN": "abc",
    "WANDB_API_KEY": "abc",
    "AWS_SECRET_ACCESS_KEY": "abc",
    "DB_CREDENTIALS": "abc",
    "NOTES": "sk-0123456789abcdefghij",
    "SMTP_PASS": "abc",
    "KEY_PASSPHRASE": "abc",
    "HTTP_AUTH": "me:pw",
    "SENTRY_DSN": "abc",
    "SLACK_WEBHOOK_URL": "https://hooks.example/T0/B0/abc",
    "REPOSITORY": "https://abcdef@git.example/project",
    "SECRET": "/abc+def/ghi=",
    "STORE_SLASH": "postgresql://me:p/w@host:5432/runs",
    "STORE_AT": "postgresql://me:p@w@host/runs",
    "STORE_COLON": "amqp://me:p:w@host",
    "STORE_ALL": "mongodb+srv://me:1x/2:3@4/@host/runs?retry=1",
    "STORE_DIGITS": "redis://:123456/7@host:6379/0",
    "STORE_USER": "postgresql://me@here:pw@host/runs",
}
NO_SECRETS = {
    "TOKENIZERS_PARALLELISM": "false",
    "PATH": "/usr/bin",
    "HTTPS_PROXY": "http://proxy.example:3128",
    "NCCL_DEBUG": "WARN",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "HF_TOKEN": "$(cat ~/.token)",
    "NCCL_SOCKET_IFNAME": "^docker0,lo",
    "PATTERN": "a",
    "MONKEY": "b",
    "SSH_AUTH_SOCK": "/run/user/0/agent.1",
    "IMAGE": "registry/name:tag@sha256:0123abcd",
    "PASSES": "3",
    "STORE": "postgresql://host:5432/runs?user=me@here",
    "STORE_V6": "http://[::1]:8080/a@b",
    "WHERE": "file:///home/me@here/data:set/a@b",
    "PULLED": "docker://registry:5000/name:tag@sha256:0123abcd",
    "PULLED_TAG": "docker://ubuntu:22.04@sha256:0123abcd",
    "PACKAGE": "git+ssh://git@host:team/project.git@v1",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_with_a_secret(name: str) -> None:
    assert is_secret(name, VARIABLES[name])


@pytest.mark.parametrize("name", NO_SECRETS)
def test_a_variable_without_a_secret(name: str) -> None:
    assert not is_secret(name, NO_SECRETS[name])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.api_key", "abc", True),
        ("model.db.password", "abc", True),
        ("data.url", "postgresql://me:pw@host/db", True),
        ("wandb.notes", "with ghp_0123456789abcdefghij", True),
        ("model.openai_key", "abc", True),
        ("model.hf_token", "abc", True),
        ("data.github_pat", "abc", True),
        ("data.my_pwd", "abc", True),
        ("data.db_pass", "abc", True),
        ("data.passphrase", "abc", True),
        ("wandb.notes", "https://hooks.slack.com/services/T0/B0/abc", True),
        ("model.mask_token", "<mask>", False),
        ("model.num_forward_pass", "two", False),
        ("data.sort_key", "name", False),
        ("data.key", "image", False),
        ("data.target_key", "label", False),
        ("data.password", "/run/secrets/password", False),
        ("data.url", "https://host:8080/a@b", False),
        ("model.tokenizer", "bert-base-uncased", False),
    ],
)
def test_an_argument_is_a_secret_only_if_it_is_certain(key: str, value: str, expected: bool) -> None:
    assert is_secret(key, value, certain=True) is expected
