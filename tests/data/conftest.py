"""Caches of these tests lie in temporary folders."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLIGHTNING_CACHE", str(tmp_path_factory.mktemp("qlightning")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
