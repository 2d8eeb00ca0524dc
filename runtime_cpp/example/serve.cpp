// An example of a server's calls: replays an artifact's golden cases, answers one request, or measures latencies.
//
//   serve ARTIFACT --operators DIR [--backend NAME] [--no-digests] replay [--threads T]
//   serve ARTIFACT --operators DIR [...] lookup --values 3,5,7 --lengths 2,1 [--weights 1,0.5,2] [--zero-ids]
//   serve ARTIFACT --operators DIR [...] load [--threads T] [--seconds S] [--bags B] [--ids L] [--json]
//
// Results go to stdout, progress and errors to stderr. Exit 0 done; 1 refused, or an answer differs; 2 usage.

#include <ATen/Parallel.h>
#include <large_embeddings/artifact.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <random>

namespace {

using large_embeddings::Artifact;
using large_embeddings::ArtifactError;
using large_embeddings::InvalidIds;
using large_embeddings::detail::text;
using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr const char* kUsage =
    "usage: serve ARTIFACT --operators DIR [--backend torchscript|aot_inductor] [--no-digests] COMMAND\n"
    "  replay [--threads T]                          replay the golden cases on each thread\n"
    "  lookup --values IDS --lengths LENGTHS         answer one request, lists separated by commas\n"
    "         [--weights WEIGHTS] [--zero-ids]\n"
    "  load [--threads T] [--seconds S] [--bags B]   random requests of B bags a feature, of 0 to L ids each\n"
    "       [--ids L] [--json]\n";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- The command line ------------------------------------------------------------------------------------------------

struct Arguments {
  std::string artifact;
  std::string command;
  std::string values, lengths;
  std::optional<std::string> weights;
  std::int64_t threads = 1, bags = 1, ids = 10;
  double seconds = 5;
  bool json = false;
  large_embeddings::Options options;
};

template <typename Number>
Number parse_number(const std::string& word) {
  Number number{};
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), number);
  if (error != std::errc() || end != word.data() + word.size()) throw UsageError("'" + word + "' is no such number");
  return number;
}

/// Numbers separated by commas, as a tensor [N].
template <typename Number>
at::Tensor parse_list(const std::string& list, at::ScalarType type) {
  std::vector<Number> numbers;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) numbers.push_back(parse_number<Number>(word));
  at::Tensor tensor = at::empty({static_cast<std::int64_t>(numbers.size())}, type);
  std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<Number>());
  return tensor;
}

Arguments parse_arguments(int argc, char** argv) {
  Arguments arguments;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) throw UsageError(option + " needs a value");
      return std::string(argv[++i]);
    };
    const auto count = [&](std::int64_t least) {
      const auto number = parse_number<std::int64_t>(value());
      if (number < least || number > 1'000'000) throw UsageError(text(option, " must be ", least, " to 1000000"));
      return number;
    };
    if (option == "--operators") {
      arguments.options.operator_folder = value();
    } else if (option == "--backend") {
      arguments.options.backend = value();
    } else if (option == "--no-digests") {
      arguments.options.verify_digests = false;
    } else if (option == "--zero-ids") {
      arguments.options.invalid_ids = InvalidIds::zero;
    } else if (option == "--values") {
      arguments.values = value();
    } else if (option == "--lengths") {
      arguments.lengths = value();
    } else if (option == "--weights") {
      arguments.weights = value();
    } else if (option == "--threads") {
      arguments.threads = count(1);
    } else if (option == "--bags") {
      arguments.bags = count(1);
    } else if (option == "--ids") {
      arguments.ids = count(0);
    } else if (option == "--seconds") {
      arguments.seconds = parse_number<double>(value());
      if (!(arguments.seconds > 0 && arguments.seconds <= 1e6)) {
        throw UsageError("--seconds must be more than 0, and at most a million");
      }
    } else if (option == "--json") {
      arguments.json = true;
    } else if (option.starts_with("--")) {
      throw UsageError("unknown option " + option);
    } else {
      positional.push_back(option);
    }
  }
  if (positional.size() != 2) throw UsageError("give an artifact and a command");
  arguments.artifact = positional[0];
  arguments.command = positional[1];
  if (arguments.command != "replay" && arguments.command != "lookup" && arguments.command != "load") {
    throw UsageError("unknown command " + arguments.command);
  }
  return arguments;
}

// --- replay ----------------------------------------------------------------------------------------------------------

constexpr const char* kGolden = "golden/cases.safetensors";

/// The tensors of a safetensors file by name, copied: in the file they need not be aligned.
std::map<std::string, at::Tensor> parse_safetensors(const std::string& data) {
  const std::map<std::string, at::ScalarType> types = {{"I64", at::kLong}, {"I32", at::kInt}, {"F32", at::kFloat}};
  std::uint64_t header_bytes = 0;
  if (data.size() < sizeof header_bytes) throw ArtifactError("the file is too short");
  std::memcpy(&header_bytes, data.data(), sizeof header_bytes);
  if (header_bytes > data.size() - sizeof header_bytes) throw ArtifactError("the header is longer than the file");
  const std::string_view body = std::string_view(data).substr(sizeof header_bytes + header_bytes);
  std::map<std::string, at::Tensor> tensors;
  const Json header = Json::parse(std::string_view(data).substr(sizeof header_bytes, header_bytes));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto type = types.find(entry.at("dtype").get<std::string>());
    if (type == types.end()) throw ArtifactError("the type of " + name + " is none of I64, I32, F32");
    const auto start = entry.at("data_offsets").at(0).get<std::size_t>();
    const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
    at::Tensor tensor = at::empty(entry.at("shape").get<std::vector<std::int64_t>>(), type->second);
    if (start > end || end > body.size() || end - start != tensor.nbytes()) {
      throw ArtifactError("the size of " + name + " is wrong");
    }
    if (end > start) std::memcpy(tensor.mutable_data_ptr(), body.data() + start, end - start);
    tensors.emplace(name, tensor);
  }
  return tensors;
}

std::map<std::string, at::Tensor> read_cases(const Artifact& artifact, const std::string& path) {
  const std::string where = path + "/" + kGolden;
  if (!artifact.manifest().file(kGolden)) {
    throw ArtifactError(where + ": the artifact has no golden cases; build it again");
  }
  try {
    return parse_safetensors(artifact.read_file(kGolden));
  } catch (const large_embeddings::DigestMismatchError&) {
    throw;
  } catch (const std::exception& error) {
    throw ArtifactError(text(where, ": cannot be read: ", error.what(), "; restore it or build again"));
  }
}

const std::string& output_of(const Artifact& artifact, std::int64_t column) {
  const auto& outputs = artifact.outputs();
  return std::find_if(outputs.begin(), outputs.end(), [&](const auto& output) { return column < output.end_column; })
      ->key;
}

/// The shortest digits that stand for exactly this number.
std::string spell_float(float number) {
  std::array<char, 32> digits;
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr};
}

/// Says where an answer is another one than when the artifact was built; nothing where it is the same, bit for bit or,
/// after a surgery, within the case's tolerance, where one value that is no number is as right as another.
std::optional<std::string> describe_difference(const Artifact& artifact, const at::Tensor& pooled,
                                               const at::Tensor& expected, const std::optional<at::Tensor>& tolerance) {
  if (pooled.sizes() != expected.sizes()) return c10::str("shape ", pooled.sizes(), ", expected ", expected.sizes());
  const at::Tensor answer = pooled.contiguous();
  const auto* now = answer.const_data_ptr<float>();
  const auto* before = expected.const_data_ptr<float>();
  for (std::int64_t i = 0; i < answer.numel(); ++i) {
    if (std::bit_cast<std::uint32_t>(now[i]) == std::bit_cast<std::uint32_t>(before[i])) continue;
    if (tolerance && ((std::isnan(now[i]) && std::isnan(before[i])) ||
                      std::abs(double{now[i]} - double{before[i]}) <= double{tolerance->const_data_ptr<float>()[i]})) {
      continue;
    }
    const std::int64_t column = i % answer.size(1);
    return text("output '", output_of(artifact, column), "', bag ", i / answer.size(1), ": column ", column, " is ",
                spell_float(now[i]), ", and was ", spell_float(before[i]),
                " when the artifact was built; compare the versions in its manifest with those installed");
  }
  return std::nullopt;
}

/// Replays one case after the other.
///
/// @throws ArtifactError naming the first whose answer differs.
void replay_cases(const Artifact& artifact, const std::string& path, const std::map<std::string, at::Tensor>& tensors,
                  const std::set<std::string>& cases) {
  for (const std::string& name : cases) {
    const std::string where = text(path, ": golden case '", name, "': ");
    const auto part = [&](const std::string& suffix) {
      const auto found = tensors.find(name + "/" + suffix);
      return found == tensors.end() ? std::nullopt : std::optional<at::Tensor>(found->second);
    };
    const auto values = part("values"), lengths = part("lengths"), expected = part("pooled");
    if (!values || !lengths || !expected || expected->dim() != 2 || expected->scalar_type() != at::kFloat) {
      throw ArtifactError(where + "has no values, lengths and pooled float32 [B, columns]; build the artifact again");
    }
    const std::optional<at::Tensor> tolerance = part("tolerance");
    if (tolerance && (tolerance->sizes() != expected->sizes() || tolerance->scalar_type() != at::kFloat)) {
      throw ArtifactError(where + "its tolerance is not of the shape of pooled; build the artifact again");
    }
    const at::Tensor pooled = artifact.lookup(*values, *lengths, part("per_sample_weights"));
    const std::optional<std::string> difference = describe_difference(artifact, pooled, *expected, tolerance);
    if (difference) throw ArtifactError(where + *difference);
  }
}

int replay(const Artifact& artifact, const Arguments& arguments) {
  const std::map<std::string, at::Tensor> tensors = read_cases(artifact, arguments.artifact);
  std::set<std::string> cases;
  for (const auto& [name, _] : tensors) cases.insert(name.substr(0, name.rfind('/')));
  if (cases.empty())
    throw ArtifactError(text(arguments.artifact, "/", kGolden, ": has no cases; build the artifact again"));
  large_embeddings::detail::run_on_threads(static_cast<int>(arguments.threads),
                                           [&] { replay_cases(artifact, arguments.artifact, tensors, cases); });
  std::cout << arguments.artifact << ": " << cases.size() << " golden cases "
            << (artifact.manifest().surgery ? "within their tolerance" : "bit for bit") << "\n";
  return 0;
}

// --- lookup ----------------------------------------------------------------------------------------------------------

int lookup(const Artifact& artifact, const Arguments& arguments) {
  std::optional<at::Tensor> weights;
  if (arguments.weights) weights = parse_list<float>(*arguments.weights, at::kFloat);
  const at::Tensor pooled = artifact
                                .lookup(parse_list<std::int64_t>(arguments.values, at::kLong),
                                        parse_list<std::int64_t>(arguments.lengths, at::kLong), weights)
                                .contiguous();
  const auto* number = pooled.const_data_ptr<float>();
  for (std::int64_t bag = 0; bag < pooled.size(0); ++bag) {
    for (std::int64_t column = 0; column < pooled.size(1); ++column) {
      std::cout << (column ? " " : "") << spell_float(*number++);
    }
    std::cout << '\n';
  }
  return 0;
}

// --- load ------------------------------------------------------------------------------------------------------------

struct Request {
  at::Tensor values, lengths;
  std::optional<at::Tensor> weights;
};

/// B bags a feature of 0 to L ids, all of them rows of the feature's table.
Request make_request(const Artifact& artifact, const Arguments& arguments, std::mt19937_64& random) {
  std::uniform_int_distribution<std::int64_t> length_of(0, arguments.ids);
  std::vector<std::int64_t> values, lengths;
  for (const auto& feature : artifact.features()) {
    std::uniform_int_distribution<std::int64_t> id_of(0, artifact.manifest().table(feature.table)->num_embeddings - 1);
    for (std::int64_t bag = 0; bag < arguments.bags; ++bag) {
      lengths.push_back(length_of(random));
      for (std::int64_t i = 0; i < lengths.back(); ++i) values.push_back(id_of(random));
    }
  }
  Request request{at::tensor(values, at::kLong), at::tensor(lengths, at::kLong).to(at::kInt), std::nullopt};
  if (artifact.manifest().weighted) request.weights = at::rand({request.values.numel()}, at::kFloat);
  return request;
}

/// Looks up made requests in a circle until `end`, and returns the latency of each, in nanoseconds.
std::vector<std::int64_t> measure(const Artifact& artifact, const std::vector<Request>& requests,
                                  Clock::time_point end) {
  at::set_num_threads(1);  // each thread is a worker of its own, as a server's are
  std::vector<std::int64_t> latencies;
  Clock::time_point now = Clock::now();
  for (std::size_t i = 0; now < end; i = (i + 1) % requests.size()) {
    const Request& request = requests[i];
    const Clock::time_point start = now;
    artifact.lookup(request.values, request.lengths, request.weights);
    now = Clock::now();
    latencies.push_back(std::chrono::nanoseconds(now - start).count());
  }
  return latencies;
}

/// The nearest-rank percentile of sorted latencies, in microseconds.
double percentile_us(const std::vector<std::int64_t>& sorted, double percent) {
  const auto rank = static_cast<std::size_t>(std::ceil(percent / 100 * static_cast<double>(sorted.size())));
  return static_cast<double>(sorted[std::max<std::size_t>(rank, 1) - 1]) / 1000;
}

int generate_load(const Artifact& artifact, const Arguments& arguments) {
  constexpr int kRequests = 64;  // a thread, made before the clock starts
  std::vector<std::vector<Request>> requests(static_cast<std::size_t>(arguments.threads));
  std::mt19937_64 random(0);
  for (auto& of_thread : requests) {
    for (int i = 0; i < kRequests; ++i) of_thread.push_back(make_request(artifact, arguments, random));
  }
  std::cerr << "serving " << artifact.artifact_id().substr(0, 12) << " on " << arguments.threads << " threads\n";

  std::vector<std::vector<std::int64_t>> measured(requests.size());
  const Clock::time_point start = Clock::now();
  const auto end =
      start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(arguments.seconds));
  std::atomic<std::size_t> next = 0;
  large_embeddings::detail::run_on_threads(static_cast<int>(requests.size()), [&] {
    const std::size_t thread = next++;
    measured[thread] = measure(artifact, requests[thread], end);
  });
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();

  std::vector<std::int64_t> latencies;
  for (const auto& of_thread : measured) latencies.insert(latencies.end(), of_thread.begin(), of_thread.end());
  if (latencies.empty()) throw ArtifactError("no request was answered; give more --seconds");
  std::sort(latencies.begin(), latencies.end());
  const Json figures = {{"artifact_id", artifact.artifact_id()},
                        {"backend", arguments.options.backend},
                        {"threads", arguments.threads},
                        {"bags", arguments.bags},
                        {"requests", latencies.size()},
                        {"seconds", seconds},
                        {"requests_per_second", static_cast<double>(latencies.size()) / seconds},
                        {"latency_us",
                         {{"p50", percentile_us(latencies, 50)},
                          {"p90", percentile_us(latencies, 90)},
                          {"p99", percentile_us(latencies, 99)},
                          {"p99.9", percentile_us(latencies, 99.9)},
                          {"max", percentile_us(latencies, 100)}}}};
  if (arguments.json) {
    std::cout << figures.dump() << '\n';
    return 0;
  }
  std::printf("%.0f requests/s (%zu in %.1f s, %ld threads, %ld bags a feature)\nlatency in us:",
              figures["requests_per_second"].get<double>(), latencies.size(), seconds,
              static_cast<long>(arguments.threads), static_cast<long>(arguments.bags));
  for (const char* name : {"p50", "p90", "p99", "p99.9", "max"}) {
    std::printf("  %s %.1f", name, figures["latency_us"][name].get<double>());
  }
  std::printf("\n");
  return 0;
}

int run(Arguments& arguments) {
  // The golden cases hold ids outside of their tables, which contribute zero.
  if (arguments.command == "replay") arguments.options.invalid_ids = InvalidIds::zero;
  const Artifact artifact = large_embeddings::load(arguments.artifact, arguments.options);
  if (arguments.command == "replay") return replay(artifact, arguments);
  if (arguments.command == "lookup") return lookup(artifact, arguments);
  return generate_load(artifact, arguments);
}

}  // namespace

int main(int argc, char** argv) {
  if (std::find(argv, argv + argc, std::string("--help")) != argv + argc) {
    std::cout << kUsage;
    return 0;
  }
  try {
    Arguments arguments = parse_arguments(argc, argv);
    return run(arguments);
  } catch (const UsageError& error) {
    std::cerr << "error: " << error.what() << '\n' << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
