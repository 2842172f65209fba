"""A pool of vectors, from the file to the records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.preprocessing

import dynamical_jax as dj
from dynamical_jax import gradients, images, strategies
from experiments import active_learning, fig4_approximation_ratio, gamma_variants, query_rounds
from theory import fig1_bound_and_mmd, fig2_alignment, theorem1_convergence, theorem2_generalization

NUM_FEATURES, NUM_CLASSES = 6, 3
CLASS_NAMES = np.array(["ant", "bee", "cat"])


def vectors(size, seed=0, dtype=np.float32):
    """Classes that can be learned, features whose scales differ by far, and a constant one."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, NUM_CLASSES, size)
    x = generator.normal(size=(size, NUM_FEATURES)) + 6 * np.eye(NUM_FEATURES)[y]
    x = x * [1, 100, 0.01, 1, 1, 0] + [0, 2000, 5, 0, -3, 0.1]
    return dj.Examples(x.astype(dtype), y)


def make(dtype=np.float32, size=40):
    return dj.Dataset("own", vectors(size, 0, dtype), vectors(12, 1, dtype), tuple(CLASS_NAMES))


@pytest.fixture
def features(tmp_path):
    """Writes features.npz; returns its path."""

    def write(**arrays):
        x, y = vectors(60, dtype=np.float16)
        path = tmp_path / "features.npz"
        given = {"embedding": x, "label": y, "class_names": CLASS_NAMES, **arrays}
        np.savez(path, **{name: array for name, array in given.items() if array is not None})
        return str(path)

    return write


class TestFile:
    @pytest.fixture
    def load(self, features, tmp_path):
        def load(options=None, **arrays):
            return dj.datasets.load(
                features(**arrays), cache_dir=str(tmp_path / "cache"), **(options or {})
            )

        return load

    def test_round_trip_with_a_test_set(self, load):
        (x, y), (test_x, test_y) = vectors(60, dtype=np.float16), vectors(9, 1, np.float64)
        data = load(test_embedding=test_x, test_label=CLASS_NAMES[test_y], label=CLASS_NAMES[y])
        assert (data.name, data.kind, data.class_names) == ("features", "vectors", (*CLASS_NAMES,))
        assert data.pool.x.dtype == data.test.x.dtype == np.float32
        np.testing.assert_array_equal(data.pool.x, x)  # Every half is a float32.
        np.testing.assert_array_equal(data.test.x, test_x.astype(np.float32))
        np.testing.assert_array_equal(data.pool.y, y)
        np.testing.assert_array_equal(data.test.y, test_y)
        np.testing.assert_array_equal(data.index, np.arange(60))

    def test_a_fraction_of_each_class_is_held_out(self, load):
        x, y = vectors(60, dtype=np.float16)
        data = load({"test_fraction": 0.5})
        counts = np.bincount(y)
        np.testing.assert_array_equal(np.bincount(data.test.y), np.round(counts / 2))
        np.testing.assert_array_equal(data.pool.x, x[data.index])
        np.testing.assert_array_equal(data.pool.y, y[data.index])
        held_out = np.setdiff1d(np.arange(60), data.index)
        np.testing.assert_array_equal(data.test.x, x[held_out])

    def test_index_names_the_examples(self, load):
        names = np.random.default_rng(0).permutation(60) + 1000
        data, same_rows = load(index=names), load()
        np.testing.assert_array_equal(data.index, names[same_rows.index])
        assert len({load(index=other).version for other in (names, names + 1, None)}) == 3

    def test_version_is_of_the_numbers_and_not_of_how_they_are_stored(self, load):
        x, _ = vectors(60, dtype=np.float16)
        assert {load(embedding=x.astype(dtype)).version for dtype in (float, "f4", "f2")} == {
            load().version
        }
        assert load(embedding=x + np.eye(60, NUM_FEATURES)).version != load().version

    X, Y = vectors(60)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"embedding": None}, "must hold an array image or .* it holds label, class_names"),
            ({"image": np.zeros((60, 4, 4))}, "it holds both image and embedding"),
            ({"embedding": X.astype(int)}, r"embedding must be floating-point .* got int64 of"),
            ({"embedding": X[:, 0]}, r"numbers \[n, d\], got float32 of shape \(60,\)"),
            ({"embedding": X[:, :0]}, r"numbers \[n, d\], got float32 of shape \(60, 0\)"),
            ({"embedding": X.astype(str)}, "embedding must be floating-point numbers"),
            ({"embedding": X.astype(complex)}, "embedding must be floating-point numbers"),
            ({"embedding": X[1:]}, r"embedding has 59 rows, but label is of shape \(60,\)"),
            ({"test_embedding": X}, "there is no array 'test_label'"),
            ({"test_label": Y}, "there is no array 'test_embedding'"),
            ({"test_embedding": X[:, 1:], "test_label": Y}, r"pool vectors are .*6.* test .*5"),
            ({"test_embedding": X, "test_label": Y + 1}, "test_label 3 is none of the classes"),
            ({"test_image": X, "test_label": Y}, "unknown array 'test_image'; known beside embed"),
            ({"path": Y}, r"path must be strings \[60\], each another, got int64 of shape \(60,\)"),
            ({"path": np.full(60, "a.jpg")}, r"path must be strings \[60\], each another"),
            ({"path": np.arange(60).astype(str), "index": np.arange(60)}, "both index and path"),
            (
                {"unknown": Y},
                "unknown array 'unknown'; known beside embedding are label, test_embed",
            ),
            ({"label": None}, "there is no array 'label'"),
            ({"index": Y}, r"index must be whole numbers \[60\], each another"),
            ({"index": np.arange(60) / 2}, "index must be whole numbers"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, load, arrays, message):
        with pytest.raises(dj.UserError, match=message) as error:
            load(**arrays)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])  # The last is none as float32.
    def test_rows_that_are_not_finite_are_named(self, load, value):
        x = self.X.astype(np.float64)
        x[[7, 40], [0, 2]] = value
        named = r"embedding: 2 of 60 vectors are not finite: rows 7, 40"
        with pytest.raises(dj.UserError, match=f"{named}$"):
            load({"unreadable": "refuse"}, embedding=x)
        with pytest.warns(UserWarning, match=f"{named}; they are left out$"):
            data = load(embedding=x)
        assert len(data.pool.y) + len(data.test.y) == 58
        assert not {7, 40} & set(data.index)
        np.testing.assert_array_equal(data.pool.x, self.X[data.index])
        np.testing.assert_array_equal(data.pool.y, self.Y[data.index])
        x[:] = value
        with pytest.raises(dj.UserError, match=r"60 of 60 .* not finite: rows 0, 1, 2, 3, 4, …$"):
            load(embedding=x)
        with pytest.raises(dj.UserError, match="test_embedding: 60 of 60 vectors are not finite"):
            load(test_embedding=x, test_label=self.Y)

    def test_paths_name_the_files(self, load):
        paths = np.array([f"{row % 7}/{row}.jpg" for row in range(60)])
        data = load(path=paths)
        assert [data.paths[index] for index in data.index] == paths[data.index].tolist()
        assert data.version == load().version

    def test_copies_of_the_pool_in_the_test_set_are_told(self, load):
        test = np.concatenate([self.X[:2], self.X[:3] + 1])
        with pytest.warns(UserWarning, match="2 of 5 test vectors are copies of vectors in the po"):
            load(embedding=self.X, test_embedding=test, test_label=self.Y[:5])

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_a_memory_mapped_file_is_the_same_data(self, load, tmp_path, monkeypatch, dtype):
        x = self.X.astype(dtype)
        x[3, 1] = np.nan
        path = str(tmp_path / "features.npy")
        with pytest.warns(UserWarning, match="1 of 60 vectors are not finite: rows 3; they"):
            expected = load(embedding=x)
        np.save(path, x)
        np.savez(tmp_path / "features.npz", label=self.Y, class_names=CLASS_NAMES)
        with pytest.warns(UserWarning, match="features.npy: embedding: 1 of 60"):
            data = dj.datasets.load(path)
        assert (data.version, data.name) == (expected.version, expected.name)
        np.testing.assert_array_equal(data.index, expected.index)
        for part, of in ((data.pool, expected.pool), (data.test, expected.test)):
            assert isinstance(part.x.data, images.OnDisk)
            assert (part.x.shape, part.x.dtype) == (of.x.shape, np.float32)
            np.testing.assert_array_equal(part.x[:], of.x)
        assert isinstance(data.pool_images, jax.Array)
        if dtype != np.float16:  # The dtype that is read as another.
            return
        monkeypatch.setattr(dj.datasets, "LARGEST_COPY", 64)  # Larger than memory, so to speak.
        large = dataclasses.replace(data)
        played = []
        for each in (expected, large):
            model = dj.models.create("linear", each)
            config, budget = dj.TrainingConfig(max_epochs=5), dj.Budget(8, 5, 1)
            experiment = dj.Experiment(each, model, dj.STRATEGIES["dynamical"](), budget, config)
            played.append([(r.test, r.query.tolist(), r.query_scores) for r in experiment.run()])
        assert large.pool_images is large.pool.x
        for one, other in zip(*played, strict=True):
            assert one[:2] == other[:2]
            np.testing.assert_array_equal(one[2], other[2])

    @pytest.mark.parametrize(
        ("content", "beside", "message"),
        [
            (b"no array", {"label": Y}, "features.npy is no whole .npy file"),
            (X, {"label": Y, "embedding": X}, "features.npz an array embedding, too"),
            (X, {}, "there is no array 'label'"),
            (X, None, "there is no file .*features.npz"),
            (X.astype(int), {"label": Y}, "embedding must be floating-point numbers"),
        ],
    )
    def test_memory_mapped_files_that_do_not_fit(self, tmp_path, content, beside, message):
        path = tmp_path / "features.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        if beside is not None:
            np.savez(tmp_path / "features.npz", **beside)
        with pytest.raises(dj.UserError, match=message):
            dj.datasets.load(path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 8}, "image_size has no effect on .* these are vectors, not images"),
            ({"channels": 1}, "channels has no effect on .* these are vectors, not images"),
            ({"test_dir": "photos"}, "test_dir has no effect on"),
        ],
    )
    def test_options_of_images_are_refused(self, load, options, message):
        with pytest.raises(dj.UserError, match=message):
            load(options)


class TestDataset:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.zeros((4, 2), int), "vectors must be of floating-point numbers, got int64"),
            (np.zeros(4), r"vectors \[n, d\], got \(4,\)"),
            (np.zeros((3, 2)), r"3 vectors but labels of shape \(4,\)"),
            (np.zeros((4, 5)), "pool vectors are .*test vectors"),
            (np.full((4, 2), np.nan), "pool: 4 of 4 vectors are not finite: rows 0, 1, 2, 3"),
        ],
    )
    def test_what_does_not_fit(self, x, message):
        labels = np.array([0, 1, 0, 1])
        with pytest.raises(dj.UserError, match=message):
            dj.Dataset(
                "own", dj.Examples(x, labels), dj.Examples(np.eye(2), labels[:2]), ("a", "b")
            )

    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
    def test_standardisation_is_that_of_scikit_learn(self, dtype, float64, monkeypatch):
        def in_blocks(x):
            return (x[start : start + 7] for start in range(0, len(x), 7))

        monkeypatch.setattr(images, "iterate_blocks", in_blocks)
        data = make(dtype, size=1000)  # Sums of half precision end at 65504.
        expected = sklearn.preprocessing.StandardScaler().fit(data.pool.x.astype(np.float64))
        np.testing.assert_allclose(data.mean, expected.mean_, rtol=1e-12)
        np.testing.assert_allclose(data.std[:-1], expected.scale_[:-1], rtol=1e-9)
        assert data.std[-1] == 0  # Exactly, else noise would be divided by it.
        x = dj.models.create("linear", data, feature_scale="each").standardize(data.test.x)
        given = data.test.x.astype(np.float64)
        tolerance = 1e-9 if dtype == np.float64 else 1e-3
        np.testing.assert_allclose(x, expected.transform(given), atol=tolerance)
        np.testing.assert_allclose(x[:, -1], 0, atol=1e-7)

    def test_one_scale_for_all_features_keeps_their_proportions(self):
        data = make(size=1000)
        x = dj.models.create("linear", data).standardize(data.pool.x)
        np.testing.assert_allclose(np.mean(x, axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(np.mean(np.var(x, axis=0)), 1, rtol=1e-4)
        proportions = np.std(x, axis=0) / np.asarray(data.std)
        np.testing.assert_allclose(proportions[:-1], proportions[0], rtol=1e-3)

    @pytest.mark.slow  # A file of float16 is played above.
    def test_half_precision_is_learned_from_as_its_float32(self):
        half = make(np.float16)
        parts = [dj.Examples(part.x.astype(np.float32), part.y) for part in (half.pool, half.test)]
        played = []
        for data in (half, dj.Dataset("own", *parts, half.class_names)):
            model = dj.models.create("linear", data)
            config = dj.TrainingConfig(max_epochs=5)
            strategy = dj.STRATEGIES["dynamical"]()
            experiment = dj.Experiment(data, model, strategy, dj.Budget(8, 5, 1), config)
            played.append(list(experiment.run()))
        for one, other in zip(*played, strict=True):
            assert one.test == other.test
            np.testing.assert_array_equal(one.query, other.query)
            np.testing.assert_array_equal(one.query_scores, other.query_scores)


class TestLinear:
    def test_it_starts_from_zero_and_its_embedding_is_its_input(self):
        data = make()
        model = dj.models.create("linear", data)
        variables = dj.models.init(model, jax.random.key(0), data.pool.x)
        outputs = model.apply(variables, data.pool.x)
        np.testing.assert_array_equal(outputs.logits, np.zeros((40, NUM_CLASSES)))
        np.testing.assert_array_equal(outputs.embedding, model.standardize(data.pool.x))
        # Statistics are no variables: checkpoints do not grow by them.
        shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
        assert shapes == {(NUM_FEATURES, NUM_CLASSES), (NUM_CLASSES,)}

    def test_mlp_is_dense_layers_with_relu_between(self):
        x = np.random.default_rng(0).normal(size=(5, NUM_FEATURES)).astype(np.float32)
        module = dj.models.MLP(NUM_CLASSES, hidden=(4, 7))
        variables = dj.models.init(module, jax.random.key(0), x)
        layers = [
            jax.tree.map(np.asarray, variables["params"][f"fc{index}"]) for index in (1, 2, 3)
        ]
        hidden = x
        for layer in layers[:2]:
            hidden = np.maximum(hidden @ layer["kernel"] + layer["bias"], 0)
        outputs = jax.jit(module.apply)(variables, x)
        np.testing.assert_allclose(outputs.embedding, hidden, rtol=1e-5)
        expected = hidden @ layers[2]["kernel"] + layers[2]["bias"]
        np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5)

    def test_images_are_vectors_of_their_pixels(self, dataset):
        module = dj.models.Linear(NUM_CLASSES)
        x = dataset.pool.x[:5].astype(np.float32)
        variables = {"params": {"fc": {"kernel": np.random.default_rng(0).normal(size=(128, 3))}}}
        variables["params"]["fc"]["bias"] = np.arange(3.0)
        of_images = module.apply(variables, x)
        of_vectors = module.apply(variables, x.reshape(5, -1))
        np.testing.assert_array_equal(of_images.logits, of_vectors.logits)
        assert of_images.embedding.shape == (5, 128)

    @pytest.mark.parametrize("name", sorted(set(dj.models.MODELS) - set(dj.models.FOR_VECTORS)))
    def test_models_of_images_refuse_vectors(self, name):
        with pytest.raises(
            dj.UserError, match=f"{name} takes images, .* need --model=linear or mlp"
        ):
            dj.models.create(name, make())

    @pytest.mark.parametrize("engine", dj.gradients.ENGINES)
    def test_change_of_training_dynamics_in_closed_form(self, engine, float64):
        # g = (p − y) ⊗ (h, 1), hence ‖g‖² = ‖p − y‖² (‖h‖² + 1) and products likewise.
        data = make(np.float64)
        model = dj.models.create("linear", data, feature_scale="each")
        generator = np.random.default_rng(3)
        kernel, bias = generator.normal(size=(NUM_FEATURES, NUM_CLASSES)), np.array([0.1, -0.5, 1])
        variables = {"params": {"model": {"fc": {"kernel": kernel, "bias": bias}}}}

        def by_hand(x, labels=None):
            mean, std = data.pool.x.mean(axis=0), data.pool.x.std(axis=0)
            h = np.delete((x - mean) / np.where(std > 1e-9, std, 1), -1, axis=1)
            h = np.append(h, np.zeros((len(x), 1)), axis=1)  # The constant feature.
            p = np.exp(h @ kernel + bias)
            p /= p.sum(axis=1, keepdims=True)
            labels = p.argmax(axis=1) if labels is None else labels
            return h, p - np.eye(NUM_CLASSES)[labels], labels

        labeled, unlabeled = dj.Examples(data.pool.x[:9], data.pool.y[:9]), data.pool.x[9:]
        h_u, residual_u, labels_u = by_hand(unlabeled)
        h_s, residual_s, _ = by_hand(*labeled)
        norms = (residual_u**2).sum(axis=1) * ((h_u**2).sum(axis=1) + 1)
        products = ((residual_u @ residual_s.T) * (h_u @ h_s.T + 1)).sum(axis=1)

        grad_s = gradients.set_gradient(model.apply, variables, labeled)
        terms = gradients.norms_and_products(
            model.apply, variables, unlabeled, grad_s, engine=engine
        )
        np.testing.assert_array_equal(terms.label, labels_u)
        np.testing.assert_allclose(terms.squared_norm, norms, rtol=1e-9)
        np.testing.assert_allclose(terms.inner_product, products, rtol=1e-9)
        view = dj.LearnerView(model.apply, variables, labeled, unlabeled)
        query = strategies.Dynamical(engine=engine).query(jax.random.key(0), view, len(unlabeled))
        change = norms + 2 * products
        np.testing.assert_array_equal(query.positions, np.argsort(-change))
        np.testing.assert_allclose(query.scores, np.sort(change)[::-1], rtol=1e-9)


class TestBinaries:
    @pytest.fixture
    def run(self, run_binary, tmp_path, features):
        def run(binary=active_learning, **values):
            small = {"initial_size": 8, "num_seeds": 1, "max_epochs": 4, "batch_size": 4}
            small |= {"dataset": features(), "output_dir": str(tmp_path / "run"), "num_rounds": 2}
            if binary is fig4_approximation_ratio:
                small = {name: small[name] for name in ("initial_size", "dataset", "output_dir")}
            if binary is query_rounds:
                del small["batch_size"], small["num_rounds"]
            return run_binary(binary, **{**small, **values})

        return run

    def read(self, directory):
        rounds = dj.records.read(directory / "run" / "rounds.jsonl")
        for record in rounds:
            del record["seconds"], record["flags"]["output_dir"]
        return rounds

    @pytest.mark.slow  # 5 s; what each asks for is in strategies_test.py.
    def test_strategies_of_each_kind_play(self, run, tmp_path, features):
        names = ("dynamical", "dynamical_joint", "power_margin", "coreset", "badge", "albl")
        status, output, errors = run(
            strategies=list(names), num_rounds=1, batch_size=8, max_epochs=60, learning_rate=0.1
        )
        assert (status, errors) == (None, "")
        assert "test accuracy (%) on features" in output
        rounds = self.read(tmp_path)
        data = dj.datasets.load(features(), cache_dir=str(tmp_path / "cache"))
        for name in names:
            own = [record for record in rounds if record["strategy"] == name]
            asked = [index for record in own for index in record["initial"] + record["query"]]
            assert [record["num_labeled"] for record in own] == [8, 16]
            assert len(set(asked)) == 16
            assert np.isin(asked, data.index).all()
            assert own[-1]["test_accuracy"] > 0.6  # Of three classes.
        for record in rounds:
            assert record["model"] == record["flags"]["model"] == "linear"
            assert record["dataset_version"] == data.version

    @pytest.mark.slow
    def test_a_network_with_hidden_layers(self, run, tmp_path):
        status, _, errors = run(model="mlp", hidden=["9", "5"], max_epochs=60)
        assert (status, errors) == (None, "")
        rounds = self.read(tmp_path)
        assert rounds[-1]["model"] == "mlp"
        assert rounds[-1]["test_accuracy"] > 0.6

    def test_linear_is_what_one_gets_without_a_name(self, run, tmp_path):
        run(model="linear")
        named = self.read(tmp_path)
        assert run()[0] is None  # In the same directory: the flags are the same.
        assert self.read(tmp_path) == named

    @pytest.mark.parametrize(
        "binary",
        [query_rounds, pytest.param(gamma_variants, marks=pytest.mark.slow)],
        ids=lambda module: module.__name__,
    )
    def test_other_axes(self, run, tmp_path, binary):
        options = {"budget": 8, "rounds": ["2", "1"]} if binary is query_rounds else {}
        status, _, errors = run(binary, **options)
        assert (status, errors) == (None, "")
        assert {record["model"] for record in self.read(tmp_path)} == {"linear"}

    def test_figure_4(self, run, tmp_path):
        status, output, errors = run(
            fig4_approximation_ratio, ratio_sizes=["5"], num_queries=2, max_epochs=2
        )
        assert (status, errors) == (None, "")
        assert "R is on average" in output
        text = (tmp_path / "run" / "approximation_ratio.json").read_text()
        assert '"model": "linear"' in text

    @pytest.mark.parametrize(
        "binary",
        [fig1_bound_and_mmd, fig2_alignment, theorem1_convergence, theorem2_generalization],
        ids=lambda module: module.__name__,
    )
    def test_the_theory_needs_images(self, run_binary, features, tmp_path, binary):
        output_dir = str(tmp_path / "run")
        status, output, errors = run_binary(binary, dataset=features(), output_dir=output_dir)
        assert (status, output) == (1, "")
        assert errors == (
            "error: the network of the theory, ntk_cnn, takes images, and features holds vectors\n"
        )

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"model": "cnn"}, "cnn takes images, and the data are vectors: these need --model="),
            ({"model": "mlps"}, "unknown model 'mlps' (is it 'mlp'?); choose from cnn"),
            ({"hidden": ["8"]}, "--hidden has no effect with linear, only with mlp"),
            ({"model": "mlp", "hidden": ["8", "0"]}, "--hidden must be positive whole numbers"),
            ({"image_size": 8}, "image_size has no effect on"),
            ({"channels": 1}, "--channels has no effect with a file of arrays, only with a folder"),
            (
                {"test_dir": "photos"},
                "--test_dir has no effect with a file of arrays, only with a folder",
            ),
            ({"stem": "cifar"}, "--stem has no effect with linear, only with resnet18"),
            ({"initial_size": 45}, "need 53 vectors, but the pool of features has 48"),
        ],
    )
    def test_bad_flags_are_one_line(self, run, tmp_path, values, message):
        status, output, errors = run(**values)
        assert (status, output) == (1, "")
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert message in errors
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow  # checkpoints_test.py has it with images.
    def test_killed_in_the_middle_of_training_and_continued(self, run, tmp_path, monkeypatch):
        options = {"strategies": ["dynamical", "albl"], "max_epochs": 9, "checkpoint_every": 2}
        options["target_accuracy"] = 1.0
        run(**options, output_dir=str(tmp_path / "whole" / "run"))
        expected = self.read(tmp_path / "whole")

        class Killed(BaseException):
            """As `kill -9` would: nothing may catch it."""

        save = dj.checkpoints.Checkpoints.save
        saved = []

        def killed(self, state):
            save(self, state)
            saved.append(state.underway.epoch if state.underway else 0)
            if state.round_index == 1 and state.underway:  # A slow machine saves before it as well.
                raise Killed

        monkeypatch.setattr(dj.checkpoints.Checkpoints, "save", killed)
        with pytest.raises(Killed):
            run(**options)
        assert saved[-1] > 0
        monkeypatch.setattr(dj.checkpoints.Checkpoints, "save", save)
        status, output, _ = run(**options)
        assert status is None
        assert f"continued at round 1, epoch {saved[-1]}" in output
        assert self.read(tmp_path) == expected


@pytest.mark.slow
def test_linear_on_pixels(run_binary, tmp_path):
    small = {"num_rounds": 1, "num_seeds": 1, "max_epochs": 3}
    status, _, errors = run_binary(
        active_learning, model="linear", output_dir=str(tmp_path), **small
    )
    assert (status, errors) == (None, "")
    rounds = dj.records.read(tmp_path / "rounds.jsonl")
    assert {record["model"] for record in rounds} == {"linear"}
