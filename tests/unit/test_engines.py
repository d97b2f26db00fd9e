"""Addresses: every form of DSN, what it becomes for each driver, and that no password shows."""

import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from taskiq_sa_pg import ConfigurationError
from taskiq_sa_pg.database import make_engine, parse_dsn

SECRET = "hunter2:@/?#[]%&+ ,='\"\\ü€"
QUOTED_SECRET = "hunter2%3A%40%2F%3F%23%5B%5D%25%26%2B%20%2C%3D%27%22%5C%C3%BC%E2%82%AC"


def arguments(dsn: str | URL) -> dict[str, Any]:
    """What the driver's connect() is given."""
    return parse_dsn(dsn).connect_arguments()


def connecting_with(engine: AsyncEngine) -> dict[str, Any]:
    """What a new connection of the engine would hand to the driver, without making one."""
    dialect = engine.dialect
    cargs, cparams = dialect.create_connect_args(engine.url)
    next(iter(dialect.dispatch.do_connect))(dialect, None, cargs, cparams)  # the other connects
    return dict(cparams)


@pytest.mark.parametrize(
    ("dsn", "drivername"),
    [
        ("postgres://u@h/d", "postgresql+asyncpg"),
        ("postgresql://u@h/d", "postgresql+asyncpg"),
        ("postgresql+asyncpg://u@h/d", "postgresql+asyncpg"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg"),
        ("postgresql+psycopg_async://u@h/d", "postgresql+psycopg"),
        (make_url("postgresql://u@h/d"), "postgresql+asyncpg"),
        (make_url("postgresql+psycopg://u@h/d"), "postgresql+psycopg"),
    ],
)
def test_schemes_name_the_driver(dsn: str | URL, drivername: str) -> None:
    address = parse_dsn(dsn)
    assert address.drivername == drivername
    assert (address.username, address.hosts, address.database) == ("u", (("h", None),), "d")


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_special_characters_are_percent_encoded(scheme: str) -> None:
    address = parse_dsn(f"{scheme}://us%40er:{QUOTED_SECRET}@h:1/d")
    assert address.connect_arguments()["user"] == "us@er"
    assert address.connect_arguments()["password"] == SECRET


def test_special_characters_of_several_hosts_credentials() -> None:
    address = parse_dsn(f"postgresql://us%2Cer:{QUOTED_SECRET}@a,b/d")
    assert (address.username, address.password) == ("us,er", SECRET)
    assert address.hosts == (("a", None), ("b", None))


@given(
    username=st.text(min_size=1),
    password=st.text(min_size=1),
    hosts=st.sampled_from(["h", "h:5433", "[::1]:5433", "a:1,b:2"]),
    scheme=st.sampled_from(["postgresql", "postgresql+asyncpg", "postgresql+psycopg"]),
)
def test_any_credentials_that_sqlalchemy_renders_come_back(
    username: str, password: str, hosts: str, scheme: str
) -> None:
    try:
        (username + password).encode()
    except UnicodeEncodeError:
        return
    rendered = URL.create(scheme, username, password, "HOSTS", database="d")
    text = rendered.render_as_string(hide_password=False)
    address = parse_dsn(text.replace("@HOSTS", f"@{hosts}"))
    assert (address.username, address.password, address.database) == (username, password, "d")
    assert "HOSTS" not in repr(address)


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("postgresql://h/d", (("h", None),)),
        ("postgresql://u@h:5433/d", (("h", 5433),)),
        ("postgresql://u@[2001:db8::1]/d", (("2001:db8::1", None),)),
        ("postgresql://[::1]:5433/d", (("::1", 5433),)),
        ("postgresql://u@a,b/d", (("a", None), ("b", None))),
        ("postgresql://u:p@a:5432,b:5433/d", (("a", 5432), ("b", 5433))),
        ("postgresql://a:5432,b", (("a", 5432), ("b", None))),
        ("postgresql://a,b?connect_timeout=3", (("a", None), ("b", None))),
        ("postgresql://[::1]:5432,[::2],c:1/d", (("::1", 5432), ("::2", None), ("c", 1))),
        ("postgresql://%2Frun%2Fpg/d", (("/run/pg", None),)),
        ("postgresql://%2Frun%2Fpg:5433/d", (("/run/pg", 5433),)),
        ("postgresql://%2Frun%2Fpg:5433,b:1/d", (("/run/pg", 5433), ("b", 1))),
        ("postgresql:///d?host=/run/pg", (("/run/pg", None),)),
        ("postgresql://u@/d?host=/run/pg&port=5433", (("/run/pg", 5433),)),
        ("postgresql://u@:5433/d?host=/run/pg", (("/run/pg", 5433),)),
        ("postgresql://h/d?port=5433", (("h", 5433),)),
        ("postgresql://a,b/d?host=c", (("c", None),)),
        ("postgresql:///d?host=a,b&port=1,2", (("a", 1), ("b", 2))),
        ("postgresql:///d?host=a,b&port=7", (("a", 7), ("b", 7))),
        ("postgresql:///d?host=a:1&host=b:2", (("a", 1), ("b", 2))),
        ("postgresql:///d?host=a&host=b&port=1&port=2", (("a", 1), ("b", 2))),
        ("postgresql:///d?host=::1,::2&port=1,2", (("::1", 1), ("::2", 2))),
        (URL.create("postgresql", host="a,b", port=7), (("a", 7), ("b", 7))),
    ],
)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_hosts_and_ports(
    dsn: str | URL, hosts: tuple[tuple[str, int | None], ...], driver: str
) -> None:
    if isinstance(dsn, URL):
        dsn = dsn.set(drivername=f"postgresql+{driver}")
    else:
        dsn = dsn.replace("postgresql://", f"postgresql+{driver}://")
    assert parse_dsn(dsn).hosts == hosts


@pytest.mark.parametrize(
    ("hosts", "asyncpg", "psycopg"),
    [
        ("h", {"host": ["h"]}, {"host": "h"}),
        ("h:5433", {"host": ["h"], "port": 5433}, {"host": "h", "port": "5433"}),
        ("a,b", {"host": ["a", "b"]}, {"host": "a,b"}),
        ("a:1,b", {"host": ["a", "b"], "port": [1, 5432]}, {"host": "a,b", "port": "1,"}),
        ("", {}, {}),
        (":5433", {"port": 5433}, {"port": "5433"}),
    ],
)
def test_hosts_in_each_drivers_own_form(
    hosts: str, asyncpg: dict[str, Any], psycopg: dict[str, Any]
) -> None:
    assert arguments(f"postgresql://{hosts}/d") == {**asyncpg, "database": "d"}
    given = arguments(f"postgresql+psycopg://{hosts}/d")
    assert {name: given[name] for name in given.keys() & {"host", "port"}} == psycopg
    assert given["dbname"] == "d"


@pytest.mark.parametrize("dsn", ["postgresql://", "postgresql://@/", "postgresql://:@"])
def test_what_a_dsn_leaves_out_is_left_to_the_driver(dsn: str) -> None:
    assert arguments(dsn) == {}


def test_the_query_may_say_everything() -> None:
    dsn = "postgresql://?user=u&password=p%40%2B&host=h&port=1&dbname=d"
    assert arguments(dsn) == {
        "user": "u",
        "password": "p@+",
        "host": ["h"],
        "port": 1,
        "database": "d",
    }


@pytest.mark.parametrize(
    "query",
    ["application_name=me@work", "user=me@corp", "options=-csearch_path=a,b&x=@", "x=p:q@a,b"],
)
@pytest.mark.parametrize("hosts", ["h:5432", "h:5432,i:5432"])
def test_an_at_sign_in_the_query_ends_no_password(hosts: str, query: str) -> None:
    address = parse_dsn(f"postgresql://{hosts}/d?{query}")
    assert address.hosts[0] == ("h", 5432)
    assert address.password is None


def test_libpq_parameters_reach_asyncpg_through_a_dsn() -> None:
    found = arguments(
        "postgresql://a,b/d?target_session_attrs=read-write&sslmode=verify-full"
        "&sslrootcert=%2Fca+1.pem&options=-c%20a%3Db&fallback_application_name=f"
    )
    query = make_url(found["dsn"]).query
    assert query == {
        "target_session_attrs": "read-write",
        "sslmode": "verify-full",
        "sslrootcert": "/ca 1.pem",
        "options": "-c a=b",
        "application_name": "f",
    }


def test_libpq_parameters_reach_psycopg_as_they_are() -> None:
    found = arguments("postgresql+psycopg://a,b/d?target_session_attrs=any&keepalives=1")
    assert (found["target_session_attrs"], found["keepalives"]) == ("any", "1")


def test_asyncpg_arguments_become_numbers() -> None:
    found = arguments(
        "postgresql://h/d?command_timeout=1.5&statement_cache_size=0&ssl=require"
        "&prepared_statement_cache_size=0&connect_timeout=3"
    )
    assert found == {
        "host": ["h"],
        "database": "d",
        "command_timeout": 1.5,
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "ssl": "require",
        "timeout": 3.0,
    }


@pytest.mark.parametrize(("given", "threshold"), [("none", None), ("None", None), ("0", 0)])
def test_psycopgs_prepared_statements_are_turned_off_in_the_dsn(
    given: str, threshold: int | None
) -> None:
    found = arguments(f"postgresql+psycopg://h/d?prepare_threshold={given}")
    assert found["prepare_threshold"] == threshold
    assert "prepare_threshold" not in arguments("postgresql+psycopg://h/d")


def test_a_connect_timeout_of_zero_is_no_limit_of_no_time() -> None:
    assert "timeout" not in arguments("postgresql://h/d?connect_timeout=0")


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("postgresql://u:hunter2@h/d?keepalives=1", "asyncpg does not know .* keepalives"),
        ("postgresql://u:hunter2@h/d?hostaddr=1.2.3.4", "hostaddr.*postgresql\\+psycopg://"),
        ("postgresql+psycopg://h/d?command_timeout=1", "psycopg does not .* command_timeout"),
        ("postgresql://u:hunter2@h/d?command_timeout=soon", "must be numbers"),
        ("postgresql://u:hunter2@h/d?prepare_threshold=none", "asyncpg does not know .* prepare_"),
        (
            "postgresql+psycopg://u:hunter2@h/d?statement_cache_size=0",
            "psycopg does not know .* statement_cache_size",
        ),
        ("postgresql+psycopg://u:hunter2@h/d?prepare_threshold=off", "must be a number or none"),
        ("postgresql+psycopg2://u:hunter2@h/d", "driver 'postgresql\\+psycopg2'"),
        ("postgresql+pg8000://u:hunter2@h/d", "driver 'postgresql\\+pg8000'"),
        ("mysql+aiomysql://u:hunter2@h/d", "driver 'mysql\\+aiomysql'"),
        ("sqlite+aiosqlite:///hunter2", "driver 'sqlite\\+aiosqlite'"),
        (make_url("postgresql+psycopg2://u:hunter2@h/d"), "driver 'postgresql\\+psycopg2'"),
        ("postgresql://u:hunter2/d", "percent-encoded"),
        ("postgresql://u:hunter2,b/d", "invalid port number"),
        ("postgresql://u:pass@hunter2@h/d", "percent-encoded"),
        ("postgresql://u:pass@hunter2@a:1,b:2/d", "percent-encoded"),
        ("postgresql://u:pass@hunter2?x@h/d", "percent-encoded"),
        ("postgresql://u:pass@hunter2?x@h/d?sslmode=require", "percent-encoded"),
        ("postgresql://u:hunter2@h:port/d", "percent-encoded"),
        ("postgresql://u:hunter2@h:70000/d", "invalid port number"),
        ("postgresql://u:hunter2@h:0,b/d", "invalid port number"),
        ("postgresql://u:hunter2@a,,b/d", "several hosts, and one of them is empty"),
        ("postgresql:///d?host=a,b&port=1,2,3&password=hunter2", "2 hosts and 3 ports"),
        ("postgresql://u:hunter2@[::1/d", "percent-encoded"),
        ("host=h password=hunter2", "percent-encoded"),
        ("u:hunter2@h/d", "percent-encoded"),
        ("", "percent-encoded"),
        (7, "not int"),
        (b"postgresql://u:hunter2@h/d", "not bytes"),
    ],
)
def test_an_address_that_cannot_work_is_refused_and_keeps_its_secret(dsn: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        parse_dsn(dsn)
    assert "hunter2" not in "".join(traceback.format_exception_only(caught.value))
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:hunter2@h/d",
        "postgresql://u:hunter2@a:1,b:2/d",
        "postgresql+psycopg://u@h/d?password=hunter2",
        "postgresql://u@h/d?sslpassword=hunter2",
    ],
)
def test_no_repr_shows_the_password(dsn: str) -> None:
    engine = make_engine(dsn)
    for shown in (parse_dsn(dsn), engine, engine.url, str(engine.url), engine.pool):
        assert "hunter2" not in repr(shown)


def test_engine_has_a_pool_without_overflow_unless_told() -> None:
    assert (engine_pool("postgresql://h").size(), engine_pool("postgresql://h")._max_overflow) == (
        5,
        0,
    )
    assert engine_pool("postgresql://h", pool_size=2, max_overflow=3)._max_overflow == 3
    assert isinstance(engine_pool("postgresql://h", poolclass=NullPool), NullPool)


def test_the_users_data_stay_out_of_errors_unless_told() -> None:
    assert make_engine("postgresql://h").sync_engine.hide_parameters
    assert not make_engine("postgresql://h", hide_parameters=False).sync_engine.hide_parameters


def engine_pool(dsn: str, **kwargs: Any) -> Any:
    return make_engine(dsn, **kwargs).pool


@pytest.mark.parametrize("dsn", ["postgresql://u:hunter2@h/d", "postgresql+psycopg://u:hunter2@h"])
def test_engine_arguments_that_do_not_exist_are_refused(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="no_such_argument") as caught:
        make_engine(dsn, no_such_argument=1)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_callable_is_asked_for_every_connection(driver: str) -> None:
    passwords = iter(["first", "second", "third"])
    engine = make_engine(lambda: f"postgresql+{driver}://u:{next(passwords)}@h/d")
    assert connecting_with(engine)["password"] == "second"
    assert connecting_with(engine)["password"] == "third"


def test_a_callable_may_return_a_url_and_change_hosts() -> None:
    hosts = iter(["a", "b:7,c"])
    engine = make_engine(lambda: f"postgresql://{next(hosts)}/d")
    found = connecting_with(engine)
    assert (found["host"], found["port"]) == (["b", "c"], [7, 5432])


def test_a_callable_must_stay_with_its_driver() -> None:
    dsns = iter(["postgresql://h/d", "postgresql+psycopg://u:hunter2@h/d"])
    engine = make_engine(lambda: next(dsns))
    with pytest.raises(ConfigurationError, match="changed the driver") as caught:
        connecting_with(engine)
    assert "hunter2" not in str(caught.value)


def test_connect_args_win_over_the_dsn() -> None:
    engine = make_engine("postgresql://u:p@h/d", connect_args={"user": "v", "timeout": 2})
    found = connecting_with(engine)
    assert (found["user"], found["password"], found["timeout"]) == ("v", "p", 2)


def test_what_sqlalchemy_gives_its_driver_beside_the_address_stays() -> None:
    engine = make_engine("postgresql+psycopg://h/d", client_encoding="latin1")
    assert connecting_with(engine)["client_encoding"] == "latin1"
