// What only a program that links the C++ loader can show. tests/test_runtime_cpp.py builds and runs it, and reads what it says.
//
//   loader OPERATORS negative ARTIFACT     views that torch negates when they are read, on both backends
//   loader OPERATORS relink LINK A B ...   artifacts that take one another's place under one path, compiled

#include <large_embeddings/artifact.h>

#include <filesystem>
#include <iostream>

using namespace large_embeddings;

namespace {

/// One bag of id 0 a feature, each with the weight 1.
at::Tensor first_rows(const Artifact& artifact) {
  const auto features = static_cast<std::int64_t>(artifact.features().size());
  const auto weights = artifact.manifest().weighted ? std::optional(at::ones({features})) : std::nullopt;
  return artifact.lookup(at::zeros({features}, at::kLong), at::ones({features}, at::kInt), weights);
}

void check(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

void look_up_negative_views(const Options& options, const std::string& path) {
  const Artifact artifact = load(path, options);
  const auto features = static_cast<std::int64_t>(artifact.features().size());
  const at::Tensor values = at::ones({1}, at::kLong);
  at::Tensor lengths = at::zeros({features}, at::kInt);
  lengths[0] = 1;
  const at::Tensor imaginary = at::imag(at::conj(at::complex(at::zeros({1}), at::full({1}, 2.0))));
  check(imaginary.is_neg() && imaginary.item<float>() == -2, "the weight is no negative view");
  check(at::equal(artifact.lookup(values, lengths, imaginary), artifact.lookup(values, lengths, at::full({1}, -2.0))),
        "a weight of -2 counts as another one");
  for (const auto& [ids, sizes, expected] :
       {std::tuple(at::_neg_view(values), lengths, "id -1 is outside"),
        std::tuple(values, at::_neg_view(lengths), "length of bag 0 is -1")}) {
    try {
      artifact.lookup(ids, sizes, at::ones({1}));
      check(false, expected);
    } catch (const InvalidInputError& error) {
      check(std::string(error.what()).find(expected) != std::string::npos, error.what());
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  options.operator_folder = arguments[1];
  const std::string command = arguments[2];
  try {
    if (command == "negative") {
      for (const char* backend : {"torchscript", "aot_inductor"}) {
        options.backend = backend;
        look_up_negative_views(options, arguments[3]);
      }
    } else {
      options.backend = "aot_inductor";
      for (int i = 4; i < count; ++i) {
        std::filesystem::remove(arguments[3]);
        std::filesystem::create_symlink(arguments[i], arguments[3]);
        const at::Tensor pooled = first_rows(load(arguments[3], options)).contiguous();
        for (std::int64_t column = 0; column < pooled.numel(); ++column) {
          std::cout << std::hexfloat << pooled.data_ptr<float>()[column] << (column + 1 < pooled.numel() ? ' ' : '\n');
        }
      }
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
