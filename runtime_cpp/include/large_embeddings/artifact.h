// Loads an inference artifact, format version 1 (artifacts/FORMAT.md), and looks embeddings up in it.
//
//   #include <large_embeddings/artifact.h>
//
//   large_embeddings::Options options;
//   options.operator_folder = "/opt/fbgemm_gpu";  // the folder of FBGEMM's libraries
//   const large_embeddings::Artifact artifact = large_embeddings::load("artifacts/demo", options);
//   const at::Tensor pooled = artifact.lookup(values, lengths);  // float32 [B, sum(D)]
//
// `load` verifies before it runs anything: the manifest, the set of files, sizes, digests, headers. It then maps the
// rows read-only and shared, so that N processes hold one copy, and attaches the mapping to the graph. `lookup` checks
// every request before the graph sees it. Whatever is refused is one exception, in the words of the Python loader.
//
// The header is the whole library. It includes torch/script.h, which takes a compiler some 20 seconds: include it in
// one file of a server, not in all of them.
//
// Shapes by letter: F features, B bags a feature, N ids, E num_embeddings, D embedding_dim.

#pragma once

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/evp.h>

#include <nlohmann/json.hpp>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cctype>
#include <charconv>
#include <cerrno>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace large_embeddings {

// --- Errors ----------------------------------------------------------------------------------------------------------

/// Root of every error that this library raises on purpose, one class a kind as in runtime_py/errors.py. Everything but
/// `InvalidInputError` means that the artifact must not be served.
class ArtifactError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// manifest.json is unreadable, malformed, or contradicts itself.
class ManifestError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// The artifact was written in a format version that this reader does not know.
class UnknownFormatVersionError : public ManifestError {
  using ManifestError::ManifestError;
};

/// manifest.json has a field that this format version does not define.
class UnknownFieldError : public ManifestError {
  using ManifestError::ManifestError;
};

/// A file that the manifest lists is not there.
class MissingFileError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// The folder holds something that the manifest does not list, or a link.
class ExtraFileError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// A file has another size than the manifest says.
class SizeMismatchError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// A file's bytes are not those that were published.
class DigestMismatchError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// The weight file's header and the manifest disagree.
class WeightFileError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// A vocabulary's header and the manifest disagree.
class VocabularyFileError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// A graph cannot be loaded here, or does not fit the weight file.
class GraphError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// The artifact has no graph for what was asked, or this machine lacks what the graph needs.
class UnsupportedError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

/// A request was refused; the message names the feature, the position, the value and what is allowed.
class InvalidInputError : public ArtifactError {
  using ArtifactError::ArtifactError;
};

// --- The manifest ----------------------------------------------------------------------------------------------------

/// A digest of one algorithm, whose name carries all its parameters; `value` is lower-case hexadecimal.
struct Digest {
  std::string algorithm;
  std::string value;

  bool operator==(const Digest&) const = default;
};

/// E canonical rows of D values, at `offset_bytes` of the weight data.
struct Table {
  std::string name;
  std::int64_t num_embeddings = 0;
  std::int64_t embedding_dim = 0;
  std::string serving_precision;  // fp32, fp16, int8, int4 or int2
  std::int64_t row_bytes = 0;
  std::int64_t offset_bytes = 0;
  Digest digest;
};

/// A table's vocabulary (entity id -> row), in its own file.
struct StoredVocabulary {
  std::string table;
  std::string path;
  std::int64_t entities = 0;
  std::int64_t capacity = 0;
  Digest digest;
};

/// One input of the lookup, in graph order.
struct Feature {
  std::string name;
  std::string table;
  std::string pooling;  // sum or mean
  bool weighted = false;
};

/// A parameter or buffer of a surgery, at `offset_bytes` of the weight data, of the safetensors type `dtype`.
struct Parameter {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> dims;
  std::int64_t offset_bytes = 0;
  Digest digest;
};

/// What every graph does to the pooled embeddings: a module of the release. The graphs hold it; no class is needed.
struct Surgery {
  std::string module;
  std::string kwargs;  // JSON
  Digest code;
  std::vector<Parameter> parameters;
};

/// One block of output columns, in graph order: [`first_column`, `end_column`) of what `lookup` returns.
struct Output {
  std::string key;
  std::int64_t dim = 0;
  std::int64_t first_column = 0;
  std::int64_t end_column = 0;
};

/// One exported form of the lookup, and what it needs from the machine that runs it.
struct Graph {
  std::string backend;
  std::string target;
  std::string path;  // a file or, of an AOTInductor graph, a folder
  std::vector<std::string> operator_libraries;
  std::string torch;
  std::string fbgemm_gpu;
  std::optional<std::string> isa;     // the instruction set that an AOTInductor graph was compiled for
  std::optional<std::int64_t> opset;  // the operator set of an ONNX graph
};

/// One file of the artifact other than the manifest.
struct File {
  std::string path;
  std::int64_t bytes = 0;
  Digest digest;
};

/// What a loader needs of manifest.json. Reports, choices and provenance are checked, and not kept.
struct Manifest {
  std::string artifact_id;
  std::vector<Table> tables;
  std::vector<Feature> features;
  std::vector<Output> outputs;
  std::optional<Surgery> surgery;
  bool weighted = false;
  std::int64_t weights_offset_bytes = 0;
  std::int64_t weights_bytes = 0;
  std::vector<StoredVocabulary> vocabularies;
  std::vector<Graph> graphs;
  std::vector<File> files;

  /// The table of that name, or null.
  const Table* table(std::string_view name) const;
  /// The file of that path, or null.
  const File* file(std::string_view path) const;
  /// Whether a file is as large as the tables: mapped, and never read as a whole.
  bool is_mapped(std::string_view path) const;
};

// --- The loader ------------------------------------------------------------------------------------------------------

/// What to do with an id outside its table: refuse the request, or let the id contribute zero.
enum class InvalidIds { error, zero };

struct Options {
  /// The folder of FBGEMM's libraries: `fbgemm_gpu` in the site-packages of Python, or a copy of it.
  std::string operator_folder;
  /// `torchscript` or `aot_inductor`, where the artifact has that graph.
  std::string backend = "torchscript";
  InvalidIds invalid_ids = InvalidIds::error;
  /// Compare every digest. If false, those of the rows and the vocabularies are left out, and of these files size and
  /// header are compared: a terabyte cannot be read at every start of a worker.
  bool verify_digests = true;
  /// Cores that compute the digests of the rows; 0: all, at most 8.
  int threads = 0;
};

namespace detail {
struct State;
}

/// A loaded artifact. It holds no state that a call changes, so any number of threads may use one. A copy is another
/// handle on the same; the rows are unmapped with the last of them.
class Artifact {
 public:
  /// Looks up one batch.
  ///
  /// @param values int64 [N] (int32 is widened): the ids, feature after feature in the manifest's order.
  /// @param lengths int32 [F * B] (int64 is narrowed), feature-major: how many ids each bag has.
  /// @param per_sample_weights float32 [N], where the artifact is weighted and only there.
  /// @return float32 [B, sum(D)], the columns as `outputs()` says.
  /// @throws InvalidInputError naming feature, bag, position, value and what is allowed.
  at::Tensor lookup(const at::Tensor& values, const at::Tensor& lengths,
                    const std::optional<at::Tensor>& per_sample_weights = std::nullopt) const;

  /// The bytes of a small file of the artifact, read now and compared with its digest.
  ///
  /// @throws MissingFileError the manifest does not list it, or it is one of those that are mapped.
  /// @throws DigestMismatchError it was changed.
  std::string read_file(const std::string& path) const;

  const Manifest& manifest() const;
  const std::string& artifact_id() const { return manifest().artifact_id; }
  const std::vector<Feature>& features() const { return manifest().features; }
  const std::vector<Output>& outputs() const { return manifest().outputs; }

 private:
  friend Artifact load(const std::string& path, const Options& options);
  explicit Artifact(std::shared_ptr<const detail::State> state) : state_(std::move(state)) {}

  std::shared_ptr<const detail::State> state_;
};

/// Verifies an artifact and makes it ready to serve.
///
/// @throws ArtifactError of the first kind that applies: the manifest, extra, missing and wrongly sized files, digests,
///   headers, the graph. A message names every file of its kind.
Artifact load(const std::string& path, const Options& options);

// --- Texts -----------------------------------------------------------------------------------------------------------

namespace detail {

inline void append(std::string& out, std::string_view part) { out += part; }
inline void append(std::string& out, std::integral auto part) { out += std::to_string(part); }

/// The parts, texts and integers, one after the other. No stream: that would follow the process's locale, and some
/// group digits.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <typename Items>
std::string join(const Items& items, std::string_view separator = ", ") {
  std::string joined;
  bool first = true;
  for (const auto& item : items) {
    joined += first ? "" : separator;
    joined += item;
    first = false;
  }
  return joined;
}

/// Text in quotes, as Python shows it: with control characters escaped, so that a message stays one line.
inline std::string quote(const std::string& value) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const bool plain = value.find('\'') == std::string::npos || value.find('"') != std::string::npos;
  const char mark = plain ? '\'' : '"';
  std::string quoted(1, mark);
  for (std::size_t i = 0; i < value.size(); ++i) {
    const auto byte = static_cast<unsigned char>(value[i]);
    const auto next = i + 1 < value.size() ? static_cast<unsigned char>(value[i + 1]) : 0xFF;
    if (byte == '\\' || byte == static_cast<unsigned char>(mark)) {
      quoted += {'\\', value[i]};
    } else if (byte == '\n' || byte == '\r' || byte == '\t') {
      quoted += {'\\', byte == '\n' ? 'n' : byte == '\r' ? 'r' : 't'};
    } else if (byte < 0x20 || byte == 0x7F) {
      quoted += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    } else if (byte == 0xC2 && next < 0xA0) {  // U+0080 to U+009F
      quoted += {'\\', 'x', kDigits[next >> 4], kDigits[next & 15]};
      ++i;
    } else {
      quoted += value[i];
    }
  }
  return quoted + mark;
}

/// A list of texts as Python shows it.
inline std::string quote_list(const std::vector<std::string>& values) {
  std::vector<std::string> quoted;
  for (const std::string& value : values) quoted.push_back(quote(value));
  return text("[", join(quoted), "]");
}

inline std::string spell(const Digest& digest) { return digest.algorithm + ":" + digest.value; }

/// What an error of torch says in the end; before come its internals, and after in C++ a trace of the stack.
inline std::string last_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  std::string message = of_torch ? of_torch->what_without_backtrace() : error.what();
  message.erase(message.find_last_not_of(" \n\r\t") + 1);
  return message.substr(message.find_last_of('\n') + 1);
}

[[noreturn]] inline void throw_unreadable(const std::string& path, int error) {
  throw ArtifactError(text(path, ": cannot be read: ", std::strerror(error)));
}

// --- Digests ---------------------------------------------------------------------------------------------------------

constexpr std::string_view kSha256 = "sha256";
constexpr std::string_view kZeroed = "sha256-zeroed";
constexpr std::string_view kTables = "sha256-tables";
constexpr std::string_view kRows = "sha256-rows-1048576";
constexpr std::int64_t kChunkBytes = 1048576;

using RawDigest = std::array<unsigned char, 32>;

inline RawDigest sha256(std::string_view data) {
  RawDigest digest;
  unsigned int size = 0;
  if (EVP_Digest(data.data(), data.size(), digest.data(), &size, EVP_sha256(), nullptr) != 1 || size != digest.size()) {
    throw ArtifactError("OpenSSL cannot compute SHA-256 here");
  }
  return digest;
}

inline std::string_view view(const RawDigest& digest) {
  return {reinterpret_cast<const char*>(digest.data()), digest.size()};
}

inline std::string hexadecimal(const RawDigest& digest) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string digits;
  for (const unsigned char byte : digest) {
    digits += kDigits[byte >> 4];
    digits += kDigits[byte & 15];
  }
  return digits;
}

inline bool is_hexadecimal(std::string_view digits) {
  return digits.size() == 64 && digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

// --- Files -----------------------------------------------------------------------------------------------------------

/// An open file that is closed with its owner.
class FileDescriptor {
 public:
  /// Opens a file to read; a link is refused.
  explicit FileDescriptor(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)) {
    if (fd_ < 0) throw_unreadable(path, errno);
  }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }

  int get() const { return fd_; }

 private:
  int fd_;
};

/// Reads up to `size` bytes from `offset` on; fewer where the file ends.
inline std::size_t read_at(const FileDescriptor& file, const std::string& path, char* out, std::size_t size,
                           std::int64_t offset) {
  std::size_t filled = 0;
  while (filled < size) {
    const ssize_t count = ::pread(file.get(), out + filled, size - filled, offset + static_cast<off_t>(filled));
    if (count == 0) break;
    if (count < 0 && errno != EINTR) throw_unreadable(path, errno);
    if (count > 0) filled += static_cast<std::size_t>(count);
  }
  return filled;
}

/// All bytes of a file.
inline std::string read_whole(const std::string& path) {
  const FileDescriptor file(path);
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) throw_unreadable(path, errno);
  if (S_ISDIR(status.st_mode)) throw_unreadable(path, EISDIR);
  std::string data(static_cast<std::size_t>(status.st_size), '\0');
  data.resize(read_at(file, path, data.data(), data.size(), 0));
  return data;
}

// --- Reading the manifest --------------------------------------------------------------------------------------------

using Json = nlohmann::json;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kWeights = "weights/tables.safetensors";
constexpr std::int64_t kSlotBytes = 16;
/// Deeper than any manifest, and shallow enough for every recursion over one.
constexpr int kMaxDepth = 100;

/// The library of an AOTInductor graph, and what torch's loader reads beside it.
constexpr std::array kAotInductorFiles = {"data/aotinductor/model/lookup.wrapper.so",
                                          "data/aotinductor/model/lookup.wrapper.json",
                                          "data/aotinductor/model/lookup.wrapper_metadata.json"};

/// How one serving precision is stored. A row is `scale_bias_bytes`, then `bits` for each value.
struct RowFormat {
  std::string_view serving_precision;
  std::string_view dtype;    // the safetensors name
  std::int64_t sparse_type;  // FBGEMM's number for it
  std::int64_t bits;
  std::int64_t scale_bias_bytes;

  /// What `embedding_dim` must be a multiple of.
  std::int64_t dim_divisor() const { return scale_bias_bytes ? 16 / bits : 1; }
};

constexpr std::array<RowFormat, 5> kRowFormats = {{{"fp32", "F32", 0, 32, 0},
                                                   {"fp16", "F16", 1, 16, 0},
                                                   {"int8", "U8", 2, 8, 4},
                                                   {"int4", "U8", 3, 4, 4},
                                                   {"int2", "U8", 4, 2, 4}}};

/// The row format of a precision that is known to be one.
inline const RowFormat& row_format(std::string_view serving_precision) {
  return *std::find_if(kRowFormats.begin(), kRowFormats.end(),
                       [&](const RowFormat& format) { return format.serving_precision == serving_precision; });
}

/// Products and sums of figures that somebody else wrote.
inline std::int64_t multiply(std::int64_t a, std::int64_t b, const std::string& where) {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw ManifestError(where + ": more bytes than 64 bits can count");
  return result;
}

inline std::int64_t add(std::int64_t a, std::int64_t b, const std::string& where) {
  std::int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) throw ManifestError(where + ": more bytes than 64 bits can count");
  return result;
}

/// A value as messages show it.
inline std::string show(const Json& value) {
  std::string shown = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return shown.size() > 80 ? shown.substr(0, 80) + "..." : shown;
}

[[noreturn]] inline void throw_unexpected(const std::string& where, std::string_view expected, const Json& value) {
  throw ManifestError(text(where, ": expected ", expected, ", got ", show(value)));
}

// Values of an exact type: nothing is converted.

inline std::string as_text(const Json& value, const std::string& where) {
  if (!value.is_string()) throw_unexpected(where, "text", value);
  return value.get<std::string>();
}

inline std::int64_t as_integer(const Json& value, const std::string& where) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > kMost)) {
    throw_unexpected(where, "an integer of 64 bits", value);
  }
  return value.get<std::int64_t>();
}

inline bool as_boolean(const Json& value, const std::string& where) {
  if (!value.is_boolean()) throw_unexpected(where, "a boolean", value);
  return value.get<bool>();
}

inline double as_number(const Json& value, const std::string& where) {
  if (!value.is_number_float()) throw_unexpected(where, "a number with a fraction or an exponent", value);
  return value.get<double>();
}

inline std::string as_one_of(const Json& value, const std::string& where, const std::vector<std::string>& allowed) {
  if (!value.is_string() || std::find(allowed.begin(), allowed.end(), value.get<std::string>()) == allowed.end()) {
    throw_unexpected(where, "one of " + quote_list(allowed), value);
  }
  return value.get<std::string>();
}

/// `read` of every item of a list.
template <typename Read>
auto as_list(const Json& value, const std::string& where, Read read) {
  if (!value.is_array()) throw_unexpected(where, "a list", value);
  std::vector<decltype(read(value, where))> items;
  for (std::size_t i = 0; i < value.size(); ++i) items.push_back(read(value[i], text(where, "[", i, "]")));
  return items;
}

/// A JSON object that has exactly the fields that it should.
class Fields {
 public:
  Fields(const Json& value, const std::string& where, const std::vector<std::string>& names)
      : value_(value), prefix_(where.empty() ? "" : where + ".") {
    if (!value.is_object()) throw_unexpected(where, "an object", value);
    for (const auto& [key, _] : value.items()) {
      if (std::find(names.begin(), names.end(), key) == names.end()) {
        throw UnknownFieldError(text("unknown field '", prefix_, key, "'; format version 1 does not define it"));
      }
    }
    for (const std::string& name : names) {
      if (!value.contains(name)) throw ManifestError(text("field '", prefix_, name, "' is missing"));
    }
  }

  /// `read`, one of the functions above or a reader of an object, of one field.
  template <typename Read, typename... Arguments>
  auto get(const char* name, Read read, const Arguments&... arguments) const {
    return read(value_.at(name), prefix_ + name, arguments...);
  }

  /// As `get`; nothing for null.
  template <typename Read>
  auto get_optional(const char* name, Read read) const {
    const Json& found = value_.at(name);
    using Value = decltype(read(found, prefix_));
    return found.is_null() ? std::optional<Value>() : std::optional<Value>(read(found, prefix_ + name));
  }

 private:
  const Json& value_;
  std::string prefix_;
};

inline std::string as_precision(const Json& value, const std::string& where) {
  return as_one_of(value, where, {"fp32", "fp16", "int8", "int4", "int2"});
}

inline Digest as_digest(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"algorithm", "value"});
  return {fields.get("algorithm", as_text), fields.get("value", as_text)};
}

inline Table as_table(const Json& value, const std::string& where) {
  const Fields fields(
      value, where,
      {"name", "num_embeddings", "embedding_dim", "serving_precision", "row_bytes", "offset_bytes", "digest"});
  return {fields.get("name", as_text),
          fields.get("num_embeddings", as_integer),
          fields.get("embedding_dim", as_integer),
          fields.get("serving_precision", as_precision),
          fields.get("row_bytes", as_integer),
          fields.get("offset_bytes", as_integer),
          fields.get("digest", as_digest)};
}

inline StoredVocabulary as_vocabulary(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"table", "path", "entities", "capacity", "digest"});
  return {fields.get("table", as_text), fields.get("path", as_text), fields.get("entities", as_integer),
          fields.get("capacity", as_integer), fields.get("digest", as_digest)};
}

inline Feature as_feature(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"name", "table", "pooling", "weighted"});
  return {fields.get("name", as_text), fields.get("table", as_text),
          fields.get("pooling", as_one_of, std::vector<std::string>{"sum", "mean"}),
          fields.get("weighted", as_boolean)};
}

inline Output as_output(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"key", "dim"});
  return {fields.get("key", as_text), fields.get("dim", as_integer)};
}

/// How a parameter's values are stored.
struct ParameterType {
  std::string_view dtype;  // the safetensors name
  at::ScalarType type;
  std::int64_t bytes;
};

constexpr std::array<ParameterType, 8> kParameterTypes = {{{"F64", at::kDouble, 8},
                                                           {"F32", at::kFloat, 4},
                                                           {"F16", at::kHalf, 2},
                                                           {"BF16", at::kBFloat16, 2},
                                                           {"I64", at::kLong, 8},
                                                           {"I32", at::kInt, 4},
                                                           {"U8", at::kByte, 1},
                                                           {"BOOL", at::kBool, 1}}};

/// The type of a name that is known to be one.
inline const ParameterType& parameter_type(std::string_view dtype) {
  return *std::find_if(kParameterTypes.begin(), kParameterTypes.end(),
                       [&](const ParameterType& type) { return type.dtype == dtype; });
}

inline Parameter as_parameter(const Json& value, const std::string& where) {
  const auto integers = [](const Json& list, const std::string& at) { return as_list(list, at, as_integer); };
  std::vector<std::string> types;
  for (const ParameterType& type : kParameterTypes) types.emplace_back(type.dtype);
  const Fields fields(value, where, {"parameter", "dtype", "dims", "offset_bytes", "digest"});
  return {fields.get("parameter", as_text), fields.get("dtype", as_one_of, types), fields.get("dims", integers),
          fields.get("offset_bytes", as_integer), fields.get("digest", as_digest)};
}

inline Surgery as_surgery(const Json& value, const std::string& where) {
  const auto parameters = [](const Json& list, const std::string& at) { return as_list(list, at, as_parameter); };
  const Fields fields(value, where, {"module", "kwargs", "code", "parameters"});
  return {fields.get("module", as_text), fields.get("kwargs", as_text), fields.get("code", as_digest),
          fields.get("parameters", parameters)};
}

inline Graph as_graph(const Json& value, const std::string& where) {
  const auto texts = [](const Json& list, const std::string& at) { return as_list(list, at, as_text); };
  const Fields fields(
      value, where, {"backend", "target", "path", "operator_libraries", "torch", "fbgemm_gpu", "isa", "opset"});
  return {fields.get("backend", as_one_of, std::vector<std::string>{"torchscript", "aot_inductor", "onnx"}),
          fields.get("target", as_one_of, std::vector<std::string>{"cpu"}),
          fields.get("path", as_text),
          fields.get("operator_libraries", texts),
          fields.get("torch", as_text),
          fields.get("fbgemm_gpu", as_text),
          fields.get_optional("isa", as_text),
          fields.get_optional("opset", as_integer)};
}

inline File as_file(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"path", "bytes", "digest"});
  return {fields.get("path", as_text), fields.get("bytes", as_integer), fields.get("digest", as_digest)};
}

/// A table with the precision that a report, or a choice, says it has.
using SaidPrecision = std::pair<std::string, std::string>;

inline SaidPrecision as_figures(const Json& value, const std::string& where) {
  const std::vector<std::string> integers = {"rows",          "rows_measured", "bytes_before", "bytes_after",
                                             "constant_rows", "vanished_rows", "outlier_rows"};
  const std::vector<std::string> numbers = {"bits_per_weight", "max_absolute_error", "mean_absolute_error",
                                            "root_mean_square_error"};
  const std::vector<std::string> numbers_or_null = {"relative_l2",  "row_relative_l2",    "mean_cosine",
                                                    "worst_cosine", "lookup_relative_l2", "lookup_mean_cosine"};
  std::vector<std::string> names = {"table", "serving_precision", "worst_cosine_row"};
  for (const auto* more : {&integers, &numbers, &numbers_or_null})
    names.insert(names.end(), more->begin(), more->end());
  const Fields fields(value, where, names);
  for (const std::string& name : integers) fields.get(name.c_str(), as_integer);
  for (const std::string& name : numbers) fields.get(name.c_str(), as_number);
  for (const std::string& name : numbers_or_null) fields.get_optional(name.c_str(), as_number);
  fields.get_optional("worst_cosine_row", as_integer);
  return {fields.get("table", as_text), fields.get("serving_precision", as_precision)};
}

inline SaidPrecision as_choice(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"table", "serving_precision", "reason"});
  fields.get("reason", as_text);
  return {fields.get("table", as_text), fields.get("serving_precision", as_precision)};
}

inline bool check_parity(const Json& value, const std::string& where) {
  const Fields fields(value, where,
                      {"seed", "cases", "serving", "quantization_max_error", "quantization_max_share_of_bound"});
  fields.get("seed", as_integer);
  fields.get("cases", as_integer);
  fields.get("serving", as_text);
  fields.get("quantization_max_error", as_number);
  fields.get("quantization_max_share_of_bound", as_number);
  return true;
}

inline void check_hexadecimal(const std::string& where, const Digest& digest) {
  if (!is_hexadecimal(digest.value)) {
    throw ManifestError(
        text(where, ": digest value must be 64 lower-case hexadecimal digits, got ", quote(digest.value)));
  }
}

inline bool check_snapshot(const Json& value, const std::string& where) {
  const Fields fields(value, where, {"uri", "format", "step", "digest"});
  fields.get("format", as_text);
  fields.get_optional("step", as_integer);
  check_hexadecimal(text("snapshot '", fields.get("uri", as_text), "'"), fields.get("digest", as_digest));
  return true;
}

inline bool check_provenance(const Json& value, const std::string& where) {
  const auto check_object = [](const Json& object, const std::string& at) {
    if (!object.is_object()) throw_unexpected(at, "an object", object);
    return true;
  };
  const auto check_tools = [&](const Json& tools, const std::string& at) {
    check_object(tools, at);
    for (const auto& [name, version] : tools.items()) as_text(version, at + "." + name);
    return true;
  };
  const Fields fields(value, where, {"snapshots", "configuration", "tools", "built_at"});
  fields.get("snapshots", [](const Json& list, const std::string& at) { return as_list(list, at, check_snapshot); });
  fields.get("configuration", check_object);
  fields.get("tools", check_tools);
  fields.get("built_at", as_text);
  return true;
}

/// Refuses what nlohmann::json reads otherwise than the format: integers beyond 64 bits, of which it makes numbers with a
/// fraction, and more levels than a stack may have room for.
inline void check_tokens(const std::string& data) {
  int depth = 0;
  for (std::size_t i = 0; i < data.size(); ++i) {
    const char c = data[i];
    if (c == '"') {
      for (++i; i < data.size() && data[i] != '"'; ++i) i += data[i] == '\\';
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxDepth) throw ManifestError(text("is damaged: nested deeper than ", kMaxDepth));
    } else if (c == '}' || c == ']') {
      --depth;
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      const std::size_t end = std::min(data.find_first_not_of("+-.0123456789eE", i), data.size());
      const std::string_view token(data.data() + i, end - i);
      std::int64_t value = 0;
      if (token.find_first_of(".eE") == token.npos &&
          std::from_chars(token.data(), token.data() + token.size(), value).ec == std::errc::result_out_of_range) {
        throw ManifestError(text("is damaged: ", token.substr(0, 80), " is beyond 64 bits"));
      }
      i = end - 1;
    }
  }
}

/// JSON, and nothing that is nearly JSON: no duplicate key, which nlohmann::json would take the last of; no byte order
/// mark, which it skips; no NUL, where it stops to read.
inline Json parse_json(const std::string& data) {
  if (data.find('\0') != std::string::npos || data.starts_with("\xEF\xBB\xBF")) {
    throw ManifestError("is damaged: not UTF-8 JSON: it has a NUL or a byte order mark");
  }
  check_tokens(data);
  std::vector<std::set<std::string>> open;  // the keys of every object around
  const auto observe = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key && !open.back().insert(parsed.get<std::string>()).second) {
      throw ManifestError(text("is damaged: the key '", parsed.get<std::string>(), "' is given twice"));
    }
    return true;
  };
  try {
    return Json::parse(data, observe);
  } catch (const Json::exception& error) {
    throw ManifestError(text("is damaged: not UTF-8 JSON: ", error.what()));
  }
}

/// The digest `sha256-zeroed` of the bytes of a manifest.
inline void check_manifest_digest(const std::string& data, const Digest& digest) {
  const std::size_t position = digest.value.size() == 64 ? data.find(digest.value) : std::string::npos;
  if (digest.algorithm != kZeroed || position == std::string::npos ||
      data.find(digest.value, position + 1) != std::string::npos) {
    throw ManifestError(text("is damaged: manifest_digest must be ", kZeroed, " with 64 digits, got ", spell(digest)));
  }
  std::string zeroed = data;
  zeroed.replace(position, 64, 64, '0');
  const std::string computed = hexadecimal(sha256(zeroed));
  if (computed != digest.value) {
    throw ManifestError(text("is damaged: its digest is ", computed, ", and it says ", digest.value));
  }
}

inline void check_unique(const std::string& what, const std::vector<std::string>& names) {
  std::map<std::string, int> counts;
  for (const std::string& name : names) ++counts[name];
  for (const auto& [name, count] : counts) {
    if (count > 1) throw ManifestError(text(what, ": '", name, "' is listed ", count, " times"));
  }
}

template <typename Item>
std::vector<std::string> names_of(const std::vector<Item>& items, std::string Item::* member) {
  std::vector<std::string> names;
  for (const Item& item : items) names.push_back(item.*member);
  return names;
}

/// The names in `chosen`, in the order of the tables.
inline std::vector<std::string> in_table_order(const Manifest& manifest, const std::vector<std::string>& chosen) {
  std::vector<std::string> ordered;
  for (const Table& table : manifest.tables) {
    if (std::find(chosen.begin(), chosen.end(), table.name) != chosen.end()) ordered.push_back(table.name);
  }
  return ordered;
}

inline void check_path(const std::string& path) {
  bool inside = !path.empty() && path.find_first_of(std::string_view("\\\0", 2)) == std::string::npos;
  std::istringstream parts(path + "/");
  for (std::string part; std::getline(parts, part, '/');)
    inside = inside && !part.empty() && part != "." && part != "..";
  if (!inside) {
    throw ManifestError(text("files: path ", quote(path), " must be relative, POSIX and inside the artifact"));
  }
  if (path == kManifest) throw ManifestError(text("files: '", kManifest, "' must not list itself"));
}

inline void check_name(const std::string& name, const char* what = "a table or a feature") {
  bool allowed = !name.empty();
  for (std::size_t i = 0; i < name.size(); ++i) {
    const auto byte = static_cast<unsigned char>(name[i]);
    const auto next = i + 1 < name.size() ? static_cast<unsigned char>(name[i + 1]) : 0;
    // U+0080 to U+009F are control characters, too. The JSON parser has refused surrogates.
    if (byte < 0x20 || byte == 0x7F || (byte == 0xC2 && next < 0xA0)) allowed = false;
  }
  if (!allowed) {
    throw ManifestError(text(quote(name), " cannot name ", what, ": it is empty, or has control characters"));
  }
}

inline void check_table(const Table& table) {
  const std::string where = "table '" + table.name + "'";
  if (table.num_embeddings < 1 || table.embedding_dim < 1) {
    throw ManifestError(text(where, ": shape [", table.num_embeddings, ", ", table.embedding_dim, "] is empty"));
  }
  const RowFormat& format = row_format(table.serving_precision);
  if (table.embedding_dim % format.dim_divisor()) {
    throw ManifestError(text(where, ": embedding_dim is ", table.embedding_dim, ", ", table.serving_precision,
                             " rows need a multiple of ", format.dim_divisor()));
  }
  const std::int64_t expected = format.scale_bias_bytes + multiply(table.embedding_dim, format.bits, where) / 8;
  if (table.row_bytes != expected) {
    throw ManifestError(text(where, ": row_bytes is ", table.row_bytes, ", expected ", expected, " (",
                             table.serving_precision, ", embedding_dim ", table.embedding_dim, ")"));
  }
  if (table.digest.algorithm != kRows) {
    throw ManifestError(text(where, ": digest algorithm '", table.digest.algorithm, "', expected '", kRows, "'"));
  }
  check_hexadecimal(where, table.digest);
}

// --- The layout of a weight file or a vocabulary ---------------------------------------------------------------------

/// A 2-D tensor of a file whose layout follows from its tensors.
struct TensorShape {
  std::string name;
  std::string dtype;  // the safetensors name
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t row_bytes = 0;
  Digest digest;                  // of its rows
  std::int64_t offset_bytes = 0;  // from the start of the data
};

inline TensorShape tensor_shape(const Table& table) {
  const RowFormat& format = row_format(table.serving_precision);
  const std::int64_t columns = format.scale_bias_bytes ? table.row_bytes : table.embedding_dim;
  return {table.name, std::string(format.dtype), table.num_embeddings, columns, table.row_bytes, table.digest};
}

inline TensorShape tensor_shape(const StoredVocabulary& vocabulary) {
  return {vocabulary.table, "I64", vocabulary.capacity, 2, kSlotBytes, vocabulary.digest};
}

inline TensorShape tensor_shape(const Parameter& parameter) {
  const std::string where = "parameter '" + parameter.name + "'";
  // A vector is one row; of more dimensions the first counts rows.
  std::int64_t columns = 1;
  for (std::size_t i = parameter.dims.size() < 2 ? 0 : 1; i < parameter.dims.size(); ++i) {
    columns = multiply(columns, parameter.dims[i], where);
  }
  const std::int64_t rows = parameter.dims.size() < 2 ? 1 : parameter.dims.front();
  const std::int64_t row_bytes = multiply(columns, parameter_type(parameter.dtype).bytes, where);
  multiply(rows, row_bytes, where);
  return {"surgery." + parameter.name, parameter.dtype, rows, columns, row_bytes, parameter.digest};
}

/// The tensors in file order, with their offsets: ordered by the largest power of two up to 4096 that divides their row
/// bytes, descending, then by name (of UTF-8, bytes are in the order of code points), without fillers.
inline std::vector<TensorShape> lay_out(std::vector<TensorShape> tensors) {
  const auto order = [](const TensorShape& tensor) {
    return std::pair(-std::min<std::int64_t>(tensor.row_bytes & -tensor.row_bytes, 4096),
                     std::string_view(tensor.name));
  };
  std::sort(tensors.begin(), tensors.end(),
            [&](const TensorShape& a, const TensorShape& b) { return order(a) < order(b); });
  std::int64_t end = 0;
  for (TensorShape& tensor : tensors) {
    const std::string where = "table '" + tensor.name + "'";
    tensor.offset_bytes = end;
    end = add(end, multiply(tensor.rows, tensor.row_bytes, where), where);
  }
  return tensors;
}

inline std::int64_t data_bytes(const std::vector<TensorShape>& laid_out) {
  const TensorShape& last = laid_out.back();
  return last.offset_bytes + last.rows * last.row_bytes;
}

/// The first bytes of the file: length prefix, JSON, and spaces up to a multiple of 4096 bytes.
inline std::string encode_header(const std::vector<TensorShape>& laid_out) {
  std::string json = "{";
  for (const TensorShape& tensor : laid_out) {
    if (json.size() > 1) json += ',';
    json += '"';
    for (const char character : tensor.name) {
      if (character == '"' || character == '\\') json += '\\';
      json += character;
    }
    json += text("\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":[", tensor.rows, ",", tensor.columns,
                 "],\"data_offsets\":[", tensor.offset_bytes, ",", tensor.offset_bytes + tensor.rows * tensor.row_bytes,
                 "]}");
  }
  json += '}';
  json.append(4095 - (8 + json.size() + 4095) % 4096, ' ');
  std::string prefix;
  for (int shift = 0; shift < 64; shift += 8) prefix += static_cast<char>(json.size() >> shift & 0xFF);
  return prefix + json;
}

// --- What the manifest must not contradict ---------------------------------------------------------------------------

inline void check_vocabularies(const Manifest& manifest) {
  const std::vector<std::string> names = names_of(manifest.vocabularies, &StoredVocabulary::table);
  check_unique("vocabularies", names);
  check_unique("vocabularies", names_of(manifest.vocabularies, &StoredVocabulary::path));
  for (const StoredVocabulary& vocabulary : manifest.vocabularies) {
    const std::string where = "vocabulary of table '" + vocabulary.table + "'";
    const Table* table = manifest.table(vocabulary.table);
    if (!table) throw ManifestError(where + ": the table is not in the manifest");
    const File* file = manifest.file(vocabulary.path);
    if (!file || vocabulary.path == kWeights) {
      throw ManifestError(text(where, ": '", vocabulary.path, "' is not among the files"));
    }
    if (vocabulary.entities < 1 || vocabulary.entities > table->num_embeddings) {
      throw ManifestError(text(where, ": ", vocabulary.entities, " entities, expected 1 to ", table->num_embeddings,
                               ", the table's rows"));
    }
    if (vocabulary.capacity <= vocabulary.entities || vocabulary.capacity >= std::int64_t{1} << 59) {
      throw ManifestError(text(where, ": capacity is ", vocabulary.capacity, ", expected more than its ",
                               vocabulary.entities, " entities, and less than 2**59"));
    }
    if (vocabulary.digest.algorithm != kRows) {
      throw ManifestError(
          text(where, ": digest algorithm '", vocabulary.digest.algorithm, "', expected '", kRows, "'"));
    }
    check_hexadecimal(where, vocabulary.digest);
    const std::vector<TensorShape> slots = lay_out({tensor_shape(vocabulary)});
    const auto size = add(static_cast<std::int64_t>(encode_header(slots).size()), data_bytes(slots), where);
    if (file->bytes != size) {
      throw ManifestError(text(vocabulary.path, ": ", file->bytes, " bytes, expected ", size, " (header and ",
                               vocabulary.capacity, " slots)"));
    }
  }
  if (names != in_table_order(manifest, names)) {
    throw ManifestError("vocabularies are not in the order of the tables");
  }
}

inline void check_graphs(const Manifest& manifest) {
  for (const Graph& graph : manifest.graphs) {
    const std::string where = "graph '" + graph.backend + "'";
    const bool compiled = graph.backend == "aot_inductor";
    std::vector<std::string> paths;
    if (!compiled) paths.push_back(graph.path);
    for (const char* name : kAotInductorFiles) {
      if (compiled) paths.push_back(graph.path + "/" + name);
    }
    for (const std::string& path : paths) {
      if (!manifest.file(path) || manifest.is_mapped(path)) {
        throw ManifestError(text(where, ": '", path, "' is not among the files"));
      }
    }
    if (graph.isa.has_value() != compiled) {
      throw ManifestError(text(where, ": isa is ", graph.isa ? quote(*graph.isa) : "None",
                               "; aot_inductor graphs have one, others none"));
    }
    if (graph.opset.has_value() != (graph.backend == "onnx")) {
      throw ManifestError(
          text(where, ": opset is ", graph.opset ? text(*graph.opset) : "None", "; onnx graphs have one, others none"));
    }
    for (const std::string& library : graph.operator_libraries) {
      const auto is_plain = [](unsigned char byte) { return byte < 0x80 && (std::isalnum(byte) || byte == '_'); };
      if (library.empty() || !std::all_of(library.begin(), library.end(), is_plain)) {
        throw ManifestError(text(where, ": ", quote(library), " is no library name"));
      }
    }
  }
}

inline void check_surgery(const Manifest& manifest) {
  const Surgery& surgery = *manifest.surgery;
  const bool columns = std::all_of(manifest.outputs.begin(), manifest.outputs.end(),
                                   [](const Output& output) { return output.dim >= 1; });
  if (manifest.outputs.empty() || !columns) {
    throw ManifestError(
        text("outputs of surgery '", surgery.module, "': expected one or more, of at least one column each"));
  }
  for (const Output& output : manifest.outputs) check_name(output.key, "an output");
  check_name(surgery.module, "a surgery");
  check_name(surgery.kwargs, "a surgery");
  if (surgery.code.algorithm != kSha256) {
    throw ManifestError(text("surgery: digest algorithm '", surgery.code.algorithm, "', expected '", kSha256, "'"));
  }
  check_hexadecimal("surgery", surgery.code);
  for (const Parameter& parameter : surgery.parameters) check_name(parameter.name, "a parameter");
  std::vector<std::string> stored = names_of(manifest.tables, &Table::name);
  for (const Parameter& parameter : surgery.parameters) stored.push_back("surgery." + parameter.name);
  check_unique("tables and parameters", stored);
  for (const Parameter& parameter : surgery.parameters) {
    const std::string where = "parameter '" + parameter.name + "'";
    std::vector<std::string> dims;
    for (const std::int64_t dim : parameter.dims) dims.push_back(std::to_string(dim));
    const bool empty = std::any_of(parameter.dims.begin(), parameter.dims.end(), [](auto dim) { return dim < 1; });
    if (empty || dims.size() > 64) {
      throw ManifestError(text(where, ": shape [", join(dims), "] is empty, or has more than 64 dimensions"));
    }
    tensor_shape(parameter);  // its bytes can be counted
    if (parameter.digest.algorithm != kRows) {
      throw ManifestError(
          text(where, ": digest algorithm '", parameter.digest.algorithm, "', expected '", kRows, "'"));
    }
    check_hexadecimal(where, parameter.digest);
  }
}

inline void check_outputs(const Manifest& manifest) {
  if (manifest.surgery) return check_surgery(manifest);
  std::vector<std::string> dims;
  bool follow = manifest.outputs.size() == manifest.features.size();
  for (std::size_t i = 0; i < manifest.features.size(); ++i) {
    const Feature& feature = manifest.features[i];
    const std::int64_t dim = manifest.table(feature.table)->embedding_dim;
    dims.push_back(text(quote(feature.name), ": ", dim));
    follow = follow && manifest.outputs[i].key == feature.name && manifest.outputs[i].dim == dim;
  }
  if (!follow) {
    throw ManifestError(text("outputs do not follow from the features, whose dims are {", join(dims), "}"));
  }
}

/// The identity of what the artifact does. The keys of a nlohmann::json are sorted, and it writes no white space; names
/// have no control characters, so that it escapes what the format says and no more.
inline std::string compute_artifact_id(const Manifest& manifest) {
  Json content = {{"features", Json::array()},
                  {"graphs", Json::array()},
                  {"outputs", Json::array()},
                  {"tables", Json::array()},
                  {"vocabularies", Json::array()}};
  for (const Feature& feature : manifest.features) {
    content["features"].push_back({{"name", feature.name},
                                   {"table", feature.table},
                                   {"pooling", feature.pooling},
                                   {"weighted", feature.weighted}});
  }
  std::set<std::string> backends;
  for (const Graph& graph : manifest.graphs) backends.insert(graph.backend);
  content["graphs"] = backends;
  for (const Output& output : manifest.outputs) {
    content["outputs"].push_back({{"key", output.key}, {"dim", output.dim}});
  }
  for (const Table& table : manifest.tables) {
    content["tables"].push_back({{"name", table.name},
                                 {"num_embeddings", table.num_embeddings},
                                 {"embedding_dim", table.embedding_dim},
                                 {"serving_precision", table.serving_precision},
                                 {"digest", spell(table.digest)}});
  }
  for (const StoredVocabulary& vocabulary : manifest.vocabularies) {
    content["vocabularies"].push_back(
        {{"table", vocabulary.table}, {"entities", vocabulary.entities}, {"digest", spell(vocabulary.digest)}});
  }
  if (manifest.surgery) {
    Json parameters = Json::array();
    for (const Parameter& parameter : manifest.surgery->parameters) {
      parameters.push_back({{"parameter", parameter.name},
                            {"dtype", parameter.dtype},
                            {"dims", parameter.dims},
                            {"digest", spell(parameter.digest)}});
    }
    content["surgery"] = {{"module", manifest.surgery->module},
                          {"kwargs", manifest.surgery->kwargs},
                          {"code", spell(manifest.surgery->code)},
                          {"parameters", parameters}};
  }
  return hexadecimal(sha256(content.dump()));
}

inline void check_consistency(const Manifest& manifest, const std::vector<SaidPrecision>& accuracy,
                              const std::vector<SaidPrecision>& choices) {
  check_unique("tables", names_of(manifest.tables, &Table::name));
  check_unique("features", names_of(manifest.features, &Feature::name));
  check_unique("outputs", names_of(manifest.outputs, &Output::key));
  std::vector<std::string> graphs;
  for (const Graph& graph : manifest.graphs) graphs.push_back(graph.backend + " for " + graph.target);
  check_unique("graphs", graphs);
  check_unique("files", names_of(manifest.files, &File::path));
  for (const File& file : manifest.files) {
    check_path(file.path);
    const std::string_view expected = manifest.is_mapped(file.path) ? kTables : kSha256;
    if (file.digest.algorithm != expected) {
      throw ManifestError(
          text(file.path, ": digest algorithm '", file.digest.algorithm, "', expected '", expected, "'"));
    }
    check_hexadecimal(file.path, file.digest);
  }
  if (!manifest.file(kWeights)) throw ManifestError(text("files: '", kWeights, "' is not listed"));
  for (const Table& table : manifest.tables) check_table(table);
  for (const Table& table : manifest.tables) check_name(table.name);
  for (const Feature& feature : manifest.features) check_name(feature.name);
  const std::vector<std::string> listed = names_of(accuracy, &SaidPrecision::first);
  if (listed != names_of(manifest.tables, &Table::name)) {
    throw ManifestError(text("accuracy: expected one entry a table, in their order, got ", quote_list(listed)));
  }
  const std::vector<std::string> chosen = names_of(choices, &SaidPrecision::first);
  check_unique("choices", chosen);
  if (chosen != in_table_order(manifest, chosen)) {
    throw ManifestError(text("choices: expected tables of the manifest, in their order, got ", quote_list(chosen)));
  }
  for (const auto* said : {&accuracy, &choices}) {
    for (const auto& [name, precision] : *said) {
      const std::string& stored = manifest.table(name)->serving_precision;
      if (precision != stored) {
        throw ManifestError(
            text("table '", name, "': is stored as ", stored, ", and elsewhere said to be ", precision));
      }
    }
  }
  check_vocabularies(manifest);
  for (const Feature& feature : manifest.features) {
    if (!manifest.table(feature.table)) {
      throw ManifestError(text("feature '", feature.name, "': table '", feature.table, "' is not in the manifest"));
    }
  }
  if (manifest.tables.empty()) throw ManifestError("tables: an artifact has at least one");
  if (manifest.features.empty()) throw ManifestError("features: an artifact has at least one");
  if (manifest.graphs.empty()) throw ManifestError("graphs: an artifact has at least one");
  check_graphs(manifest);
  const bool weighted = std::any_of(manifest.features.begin(), manifest.features.end(),
                                    [](const Feature& feature) { return feature.weighted; });
  if (manifest.weighted != weighted) {
    throw ManifestError(text("weighted is ", manifest.weighted ? "True" : "False", ", and the features say otherwise"));
  }
  check_outputs(manifest);
  const std::int64_t size = add(manifest.weights_offset_bytes, manifest.weights_bytes, kWeights);
  if (manifest.file(kWeights)->bytes != size) {
    throw ManifestError(
        text(kWeights, ": ", manifest.file(kWeights)->bytes, " bytes, expected ", size, " (header and data)"));
  }
  const std::string computed = compute_artifact_id(manifest);
  if (computed != manifest.artifact_id) {
    throw ManifestError(text("artifact_id is ", manifest.artifact_id, ", computed ", computed));
  }
}

inline Manifest parse_manifest(const std::string& data) {
  const Json document = parse_json(data);
  if (!document.is_object()) throw ManifestError("is damaged: expected an object, got " + show(document));
  const Json version = document.value("format_version", Json());
  if (!version.is_number_integer() || version != 1) {
    throw UnknownFormatVersionError(text("format_version is ", show(version), ", this reader knows 1"));
  }
  // First, so that damage is not taken for what a newer writer meant.
  if (document.contains("manifest_digest")) {
    check_manifest_digest(data, as_digest(document["manifest_digest"], "manifest_digest"));
  }
  const Fields fields(document, "",
                      {"format_version", "artifact_id", "tables", "features", "outputs", "surgery", "weighted",
                       "weights_offset_bytes", "weights_bytes", "vocabularies", "graphs", "files", "accuracy",
                       "choices", "parity", "provenance", "manifest_digest"});
  const auto list_of = [](auto read) {
    return [read](const Json& value, const std::string& where) { return as_list(value, where, read); };
  };
  Manifest manifest;
  manifest.artifact_id = fields.get("artifact_id", as_text);
  manifest.tables = fields.get("tables", list_of(as_table));
  manifest.features = fields.get("features", list_of(as_feature));
  manifest.outputs = fields.get("outputs", list_of(as_output));
  manifest.surgery = fields.get_optional("surgery", as_surgery);
  manifest.weighted = fields.get("weighted", as_boolean);
  manifest.weights_offset_bytes = fields.get("weights_offset_bytes", as_integer);
  manifest.weights_bytes = fields.get("weights_bytes", as_integer);
  manifest.vocabularies = fields.get("vocabularies", list_of(as_vocabulary));
  manifest.graphs = fields.get("graphs", list_of(as_graph));
  manifest.files = fields.get("files", list_of(as_file));
  const std::vector<SaidPrecision> accuracy = fields.get("accuracy", list_of(as_figures));
  const std::vector<SaidPrecision> choices = fields.get("choices", list_of(as_choice));
  fields.get("parity", check_parity);
  fields.get("provenance", check_provenance);
  check_consistency(manifest, accuracy, choices);
  std::int64_t end = 0;
  for (Output& output : manifest.outputs) {
    output.first_column = end;
    output.end_column = end = add(end, output.dim, "outputs");
  }
  return manifest;
}

inline Manifest read_manifest(const std::string& artifact) {
  const std::string path = artifact + "/" + kManifest;
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) {
    throw ManifestError(
        text(path, ": cannot be read: ", std::strerror(errno), "; without a manifest there is no artifact"));
  }
  if (S_ISLNK(status.st_mode)) throw ManifestError(path + ": is a symbolic link; an artifact holds none");
  if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) {  // to open a pipe is to wait for its writer
    throw ManifestError(path + ": is no regular file");
  }
  std::string data;
  try {
    data = read_whole(path);
  } catch (const ArtifactError& error) {
    throw ManifestError(text(error.what(), "; without a manifest there is no artifact"));
  }
  try {
    return parse_manifest(data);
  } catch (const UnknownFormatVersionError& error) {
    throw UnknownFormatVersionError(text(path, ": ", error.what()));
  } catch (const UnknownFieldError& error) {
    throw UnknownFieldError(text(path, ": ", error.what()));
  } catch (const ManifestError& error) {
    throw ManifestError(text(path, ": ", error.what()));
  }
}

// --- The set of files, and the small ones ----------------------------------------------------------------------------

/// Everything in one folder, without `.` and `..`.
inline std::vector<std::string> list_folder(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(path.c_str()), ::closedir);
  if (!folder) throw_unreadable(path, errno);
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = ::readdir(folder.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno != 0) throw_unreadable(path, errno);
  return names;
}

/// Refuses what is not listed (links included), what is missing, and what has another size, in this order.
inline void check_files(const std::string& artifact, const Manifest& manifest) {
  std::set<std::string> folders;
  for (const File& file : manifest.files) {
    for (std::size_t end = file.path.find('/'); end != std::string::npos; end = file.path.find('/', end + 1)) {
      folders.insert(file.path.substr(0, end));
    }
  }
  std::map<std::string, std::int64_t> found;
  std::set<std::string> extra;
  std::vector<std::string> waiting = {""};
  while (!waiting.empty()) {
    const std::string folder = waiting.back();
    waiting.pop_back();
    for (const std::string& entry : list_folder(folder.empty() ? artifact : artifact + "/" + folder)) {
      const std::string name = folder.empty() ? entry : folder + "/" + entry;
      const std::string path = artifact + "/" + name;
      struct stat status{};
      if (::lstat(path.c_str(), &status) != 0) throw_unreadable(path, errno);
      if (S_ISDIR(status.st_mode) && folders.contains(name)) {
        waiting.push_back(name);
      } else if (S_ISREG(status.st_mode) && manifest.file(name)) {
        found[name] = status.st_size;
      } else if (name != kManifest) {
        extra.insert(name);
      }
    }
  }
  if (!extra.empty()) {
    throw ExtraFileError(text(artifact, ": not in the manifest, or no regular file: ", join(extra),
                              "; an artifact is never changed after its build"));
  }
  std::set<std::string> missing;
  std::set<std::string> wrong;
  for (const File& file : manifest.files) {
    const auto size = found.find(file.path);
    if (size == found.end()) {
      missing.insert(file.path);
    } else if (size->second != file.bytes) {
      wrong.insert(text(file.path, " is ", size->second, " bytes, expected ", file.bytes));
    }
  }
  if (!missing.empty()) {
    throw MissingFileError(text(artifact, ": missing: ", join(missing), "; restore the files or build again"));
  }
  if (!wrong.empty()) {
    throw SizeMismatchError(text(artifact, ": ", join(wrong, "; "), "; restore the files or build again"));
  }
}

/// What is wrong with the bytes of a small file; empty where they are those that were published.
inline std::string describe_mismatch(const File& file, std::string_view data) {
  const Digest digest{std::string(kSha256), hexadecimal(sha256(data))};
  if (digest == file.digest) return "";
  return text(file.path, ": digest ", spell(digest), ", expected ", spell(file.digest));
}

/// Compares the digests of all small files, and returns the bytes of the one at `wanted`, if it is one of them.
inline std::string read_small_files(const std::string& artifact, const Manifest& manifest, const std::string& wanted) {
  std::string kept;
  std::vector<std::string> wrong;
  for (const File& file : manifest.files) {
    if (manifest.is_mapped(file.path)) continue;
    std::string data = read_whole(artifact + "/" + file.path);
    const std::string mismatch = describe_mismatch(file, data);
    if (!mismatch.empty()) wrong.push_back(mismatch);
    if (file.path == wanted) kept = std::move(data);
  }
  if (!wrong.empty()) {
    throw DigestMismatchError(text(artifact, ": ", join(wrong, "; "), "; restore the files or build again"));
  }
  return kept;
}

// --- The weight file and the vocabularies ----------------------------------------------------------------------------

/// Runs `work` on some threads, waits for all of them, and throws again what one of them has thrown.
///
/// Throws ArtifactError where the process may not have that many.
inline void run_on_threads(int threads, const std::function<void()>& work) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(threads));
  {
    std::vector<std::jthread> running;
    for (std::exception_ptr& failure : failures) {
      const auto body = [&] {
        try {
          work();
        } catch (...) {
          failure = std::current_exception();
        }
      };
      try {
        running.emplace_back(body);
      } catch (const std::system_error& error) {
        throw ArtifactError(text("cannot start ", threads, " threads: ", error.code().message(),
                                 "; allow this process more of them"));
      }
    }
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

/// An open file that holds the tensors that it should. It stays open: what was verified is what is mapped, whatever
/// happens to the path meanwhile. Digests are read, never through the mapping: to check a file does not make it
/// resident.
///
/// `Error` is what its readers expect where the header differs; the two texts are parts of messages.
template <typename Error>
class TensorFile {
 public:
  TensorFile(std::string path, const std::vector<TensorShape>& tensors, const char* follows_from, const char* contents)
      : path_(std::move(path)),
        tensors_(lay_out(tensors)),
        header_(encode_header(tensors_)),
        contents_(contents),
        file_(path_) {
    std::string found(header_.size(), '\0');
    found.resize(read_at(file_, path_, found.data(), found.size(), 0));
    if (found != header_) throw Error(text(path_, ": the header is not the one that follows from ", follows_from));
  }

  /// Compares every row with the digest of its tensor, and the header with that of the whole file.
  void compare_digests(const Digest& whole, int threads) const {
    std::string parts(view(sha256(header_)));
    for (const TensorShape& tensor : tensors_) {
      const RawDigest raw = digest_rows(tensor, threads);
      const Digest digest{std::string(kRows), hexadecimal(raw)};
      if (digest != tensor.digest) {
        throw DigestMismatchError(text(path_, ": ", contents_, " '", tensor.name,
                                       "' are not those that were published: digest ", spell(digest), ", expected ",
                                       spell(tensor.digest), "; restore the file or build again"));
      }
      parts += view(raw);
    }
    const Digest computed{std::string(kTables), hexadecimal(sha256(parts))};
    if (computed != whole) {
      throw DigestMismatchError(
          text(path_, ": digest ", spell(computed), ", expected ", spell(whole), "; restore the file or build again"));
    }
  }

  /// The data as one uint8 tensor that shares its pages with every process that maps the file, and owns the mapping.
  at::Tensor map() const {
    const std::size_t size = header_.size() + static_cast<std::size_t>(data_bytes(tensors_));
    struct stat status{};
    if (::fstat(file_.get(), &status) != 0) throw_unreadable(path_, errno);
    // To read a page past the end of a file kills the process.
    if (static_cast<std::size_t>(status.st_size) != size) {
      throw SizeMismatchError(
          text(path_, ": is ", status.st_size, " bytes, expected ", size, "; it was changed while it was loaded"));
    }
    void* start = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file_.get(), 0);
    if (start == MAP_FAILED) throw ArtifactError(text(path_, ": cannot be mapped: ", std::strerror(errno)));
    return at::from_blob(
        static_cast<char*>(start) + header_.size(), {data_bytes(tensors_)},
        [start, size](void*) { ::munmap(start, size); }, at::TensorOptions().dtype(at::kByte));
  }

 private:
  /// The digest `sha256-rows-1048576` of one tensor as it is in the file.
  RawDigest digest_rows(const TensorShape& tensor, int threads) const {
    const std::int64_t chunk_rows = std::max<std::int64_t>(1, kChunkBytes / tensor.row_bytes);
    const std::int64_t chunks = (tensor.rows - 1) / chunk_rows + 1;
    std::vector<RawDigest> digests(static_cast<std::size_t>(chunks));
    std::atomic<std::int64_t> next = 0;
    const auto work = [&] {
      std::string buffer;
      for (std::int64_t chunk = next++; chunk < chunks; chunk = next++) {
        try {
          const std::int64_t first = chunk * chunk_rows;
          const std::int64_t size = std::min(chunk_rows, tensor.rows - first) * tensor.row_bytes;
          buffer.resize(static_cast<std::size_t>(size));
          const auto start = static_cast<std::int64_t>(header_.size()) + tensor.offset_bytes + first * tensor.row_bytes;
          if (read_at(file_, path_, buffer.data(), buffer.size(), start) != buffer.size()) {
            throw Error(text(path_, ": table '", tensor.name, "': the file ends within the rows; it was truncated"));
          }
          digests[static_cast<std::size_t>(chunk)] = sha256(buffer);
        } catch (...) {
          next = chunks;  // nobody needs the others
          throw;
        }
      }
    };
    const auto useful = static_cast<int>(std::min<std::int64_t>(threads, chunks));
    if (useful <= 1) {
      work();
    } else {
      run_on_threads(useful, work);
    }
    std::string parts;
    for (const RawDigest& digest : digests) parts += view(digest);
    return sha256(parts);
  }

  std::string path_;
  std::vector<TensorShape> tensors_;
  std::string header_;
  const char* contents_;
  FileDescriptor file_;
};

using WeightFile = TensorFile<WeightFileError>;
using VocabularyFile = TensorFile<VocabularyFileError>;

/// The parameters of the surgery; none without one.
inline std::vector<Parameter> parameters_of(const Manifest& manifest) {
  return manifest.surgery ? manifest.surgery->parameters : std::vector<Parameter>();
}

/// Opens the weight file of a manifest that agrees with its own tables.
inline WeightFile open_weights(const std::string& artifact, const Manifest& manifest) {
  const std::string path = artifact + "/" + kWeights;
  std::vector<TensorShape> tensors;
  std::map<std::string, std::int64_t> offsets;
  for (const Table& table : manifest.tables) {
    tensors.push_back(tensor_shape(table));
    offsets[table.name] = table.offset_bytes;
  }
  for (const Parameter& parameter : parameters_of(manifest)) {
    tensors.push_back(tensor_shape(parameter));
    offsets[tensors.back().name] = parameter.offset_bytes;
  }
  const std::vector<TensorShape> laid_out = lay_out(tensors);
  const auto header_bytes = static_cast<std::int64_t>(encode_header(laid_out).size());
  if (manifest.weights_offset_bytes != header_bytes) {
    throw WeightFileError(text(path, ": the manifest says that data starts at ", manifest.weights_offset_bytes,
                               ", its tables say ", header_bytes));
  }
  for (const TensorShape& tensor : laid_out) {
    const std::int64_t said = offsets[tensor.name];
    if (said != tensor.offset_bytes) {
      throw WeightFileError(text(path, ": table '", tensor.name, "': the manifest says offset ", said,
                                 ", the layout rule gives ", tensor.offset_bytes));
    }
  }
  if (manifest.weights_bytes != data_bytes(laid_out)) {
    throw WeightFileError(text(path, ": the manifest says ", manifest.weights_bytes, " bytes of rows, its tables have ",
                               data_bytes(laid_out)));
  }
  return WeightFile(path, tensors, "the manifest's tables", "the rows of table");
}

inline VocabularyFile open_vocabulary(const std::string& artifact, const StoredVocabulary& vocabulary) {
  return VocabularyFile(artifact + "/" + vocabulary.path, {tensor_shape(vocabulary)}, "the manifest's vocabulary",
                        "the entries of the vocabulary of table");
}

// --- Requests --------------------------------------------------------------------------------------------------------

/// A batch in the graph's types, contiguous.
struct Request {
  at::Tensor values;
  at::Tensor lengths;
  std::optional<at::Tensor> per_sample_weights;
};

/// Checks requests as runtime_py/inputs.py does, with its texts. Nothing here writes to a caller's tensor.
class RequestChecker {
 public:
  RequestChecker(const Manifest& manifest, InvalidIds invalid_ids) : check_ids_(invalid_ids == InvalidIds::error) {
    for (const Feature& feature : manifest.features) {
      names_.push_back(feature.name);
      num_embeddings_.push_back(manifest.table(feature.table)->num_embeddings);
      if (feature.weighted) weighted_.push_back(feature.name);
    }
    std::sort(weighted_.begin(), weighted_.end());
  }

  Request check(const at::Tensor& values, const at::Tensor& lengths,
                const std::optional<at::Tensor>& per_sample_weights) const {
    // Copies: what is checked is what is looked up, and nobody else can change it in between.
    Request request{copy(integers("values", values), at::kLong), integers("lengths", lengths), per_sample_weights};
    const std::int64_t count = request.values.numel();
    if (per_sample_weights.has_value() != !weighted_.empty()) {
      const std::string takes =
          weighted_.empty() ? "this artifact takes no" : text("features ", quote_list(weighted_), " take");
      throw InvalidInputError(text("per_sample_weights: ", takes, " per-sample weights"));
    }
    if (per_sample_weights) request.per_sample_weights = floats("per_sample_weights", *per_sample_weights, count);
    if (count >= std::int64_t{1} << 31) {  // FBGEMM's offsets are int32, as the lengths are
      throw InvalidInputError(text("values: ", count, " ids; a request has fewer than 2**31"));
    }
    const auto features = static_cast<std::int64_t>(names_.size());
    if (request.lengths.numel() % features) {
      throw InvalidInputError(text("lengths: ", request.lengths.numel(), " do not divide into ", features,
                                   " features (", join(names_), ")"));
    }
    // As wide as the caller gave them: a length that does not fit int32 is refused, and not cut off.
    request.lengths = copy(request.lengths, request.lengths.scalar_type());
    const std::vector<std::int64_t> counts = request.lengths.scalar_type() == at::kLong
                                                 ? check_lengths<std::int64_t>(request.lengths, count)
                                                 : check_lengths<std::int32_t>(request.lengths, count);
    request.lengths = request.lengths.to(at::kInt);
    if (check_ids_) check_ids(request, counts);
    return request;
  }

 private:
  static std::string dtype_name(const at::Tensor& tensor) {
    return std::string(c10::getDtypeNames(tensor.scalar_type()).first);
  }

  /// A dense tensor of one dimension on the CPU.
  static at::Tensor dense(const std::string& what, const at::Tensor& tensor, const char* expected) {
    if (!tensor.defined()) throw InvalidInputError(text(what, ": expected ", expected, ", got no tensor"));
    if (tensor.layout() != at::kStrided || tensor.is_nested()) {
      throw InvalidInputError(
          tensor.is_nested() ? text(what, ": expected a dense tensor, got a nested one")
                             : text(what, ": expected a dense tensor, got one of layout ", c10::str(tensor.layout())));
    }
    if (tensor.dim() != 1) {
      throw InvalidInputError(text(what, ": expected one dimension, got shape [", join(spell_sizes(tensor)), "]"));
    }
    if (!tensor.device().is_cpu()) {
      throw InvalidInputError(text(what, ": expected a tensor on the CPU, got one on ", tensor.device().str()));
    }
    return tensor.detach().resolve_conj().resolve_neg();  // compiled code does not look at torch's two bits
  }

  static at::Tensor copy(const at::Tensor& tensor, at::ScalarType type) {
    return tensor.to(type, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  }

  static std::vector<std::string> spell_sizes(const at::Tensor& tensor) {
    std::vector<std::string> sizes;
    for (const std::int64_t size : tensor.sizes()) sizes.push_back(std::to_string(size));
    return sizes;
  }

  static at::Tensor integers(const std::string& what, const at::Tensor& given) {
    const at::Tensor tensor = dense(what, given, "int64 or int32");
    if (tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt) return tensor;
    if (tensor.numel() > 0) {
      throw InvalidInputError(text(what, ": expected int64 or int32, got ", dtype_name(tensor)));
    }
    return tensor.to(at::kLong);
  }

  static at::Tensor floats(const std::string& what, const at::Tensor& given, std::int64_t count) {
    const at::Tensor tensor = dense(what, given, "float32");
    if (!tensor.is_floating_point() && tensor.numel() > 0) {
      throw InvalidInputError(text(what, ": expected float32, got ", dtype_name(tensor)));
    }
    if (tensor.numel() != count) {
      throw InvalidInputError(text(what, ": ", tensor.numel(), " weights for ", count, " values"));
    }
    return tensor.to(at::kFloat).contiguous();
  }

  /// The number of ids of each feature.
  template <typename Integer>
  std::vector<std::int64_t> check_lengths(const at::Tensor& lengths, std::int64_t count) const {
    const auto* length = lengths.const_data_ptr<Integer>();
    const std::int64_t bags = lengths.numel() / static_cast<std::int64_t>(names_.size());
    const auto end = length + lengths.numel();
    if (lengths.numel() > 0) {
      const auto [low, high] = std::minmax_element(length, end);
      if (*low < 0) {
        const std::int64_t position = std::find_if(length, end, [](Integer value) { return value < 0; }) - length;
        throw InvalidInputError(text("feature '", name(position / bags), "': length of bag ", position % bags, " is ",
                                     length[position], "; a length is 0 or more"));
      }
      if (static_cast<std::int64_t>(*high) >= std::int64_t{1} << 31) {
        throw InvalidInputError(
            text("feature '", name((high - length) / bags), "': lengths: ", *high, " does not fit int32"));
      }
    }
    std::vector<std::int64_t> counts;
    std::int64_t total = 0;
    for (std::size_t feature = 0; feature < names_.size(); ++feature, length += bags) {
      std::int64_t sum = 0;
      for (std::int64_t bag = 0; bag < bags; ++bag) sum += length[bag];
      counts.push_back(sum);
      total += sum;
    }
    if (total != count) throw InvalidInputError(describe_total(counts, total, count));
    return counts;
  }

  std::string describe_total(const std::vector<std::int64_t>& counts, std::int64_t total, std::int64_t count) const {
    if (names_.size() == 1) {
      return text("feature '", names_[0], "': lengths add up to ", total, ", and there are ", count, " values");
    }
    std::vector<std::string> by_name;
    for (std::size_t i = 0; i < names_.size(); ++i) by_name.push_back(text(names_[i], " ", counts[i]));
    return text("lengths add up to ", total, " (", join(by_name), "), and there are ", count, " values");
  }

  void check_ids(const Request& request, const std::vector<std::int64_t>& counts) const {
    const auto* id = request.values.const_data_ptr<std::int64_t>();
    const auto* length = request.lengths.const_data_ptr<std::int32_t>();
    const std::int64_t bags = request.lengths.numel() / static_cast<std::int64_t>(names_.size());
    std::vector<std::string> wrong;
    for (std::size_t feature = 0; feature < names_.size(); ++feature) {
      const auto limit = static_cast<std::uint64_t>(num_embeddings_[feature]);
      std::int64_t outside = 0;
      // A negative id is a very large one without its sign. No branch: the compiler makes vectors of it.
      for (std::int64_t i = 0; i < counts[feature]; ++i) outside += static_cast<std::uint64_t>(id[i]) >= limit;
      if (outside > 0) wrong.push_back(describe_ids(feature, id, length, outside));
      id += counts[feature];
      length += bags;
    }
    if (!wrong.empty()) throw InvalidInputError(join(wrong, "; "));
  }

  /// The first id of a feature that is outside its table, and how many more there are.
  std::string describe_ids(std::size_t feature, const std::int64_t* id, const std::int32_t* length,
                           std::int64_t outside) const {
    const auto limit = static_cast<std::uint64_t>(num_embeddings_[feature]);
    std::int64_t position = 0;
    while (static_cast<std::uint64_t>(id[position]) < limit) ++position;
    std::int64_t bag = 0;
    std::int64_t inside = position;
    while (inside >= length[bag]) inside -= length[bag++];
    const std::string more = outside > 1 ? text(" (and ", outside - 1, " more)") : "";
    return text("feature '", names_[feature], "', bag ", bag, ", position ", inside, ": id ", id[position],
                " is outside [0, ", num_embeddings_[feature] - 1, "]", more);
  }

  const std::string& name(std::int64_t feature) const { return names_[static_cast<std::size_t>(feature)]; }

  bool check_ids_;
  std::vector<std::string> names_;
  std::vector<std::int64_t> num_embeddings_;
  std::vector<std::string> weighted_;  // sorted names
};

// --- Graphs ----------------------------------------------------------------------------------------------------------

/// A graph that is ready to run. `run` may be called by any number of threads.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual c10::IValue run(const Request& request) const = 0;
};

/// What a backend is made of. `bytes` are those of the graph's file, verified; empty where it has a folder.
struct GraphSource {
  const std::string& artifact;
  const Manifest& manifest;
  const Graph& graph;
  std::string bytes;
  at::Tensor weights;
};

/// What a graph was built with, and what is here.
inline std::string versions(const Graph& graph) {
  return text("it was built with torch ", graph.torch, " and FBGEMM ", graph.fbgemm_gpu, ", this is torch ",
              TORCH_VERSION);
}

/// How the rows are to be read, by the names of the graph's attributes and constants.
inline std::vector<std::pair<std::string, at::Tensor>> graph_constants(const Manifest& manifest) {
  std::vector<std::int64_t> offsets, types, rows, starts = {0};
  std::vector<std::uint8_t> mean, weighted;
  for (const Feature& feature : manifest.features) {
    const Table& table = *manifest.table(feature.table);
    offsets.push_back(table.offset_bytes);
    types.push_back(row_format(table.serving_precision).sparse_type);
    rows.push_back(table.num_embeddings);
    starts.push_back(starts.back() + table.embedding_dim);
    mean.push_back(feature.pooling == "mean");
    weighted.push_back(feature.weighted);
  }
  return {{"weights_offsets", at::tensor(offsets)},
          {"weights_types", at::tensor(types).to(at::kByte)},
          {"num_embeddings", at::tensor(rows)},
          {"dim_offsets", at::tensor(starts).to(at::kInt)},
          {"is_mean", at::tensor(mean).to(at::kBool).unsqueeze(1)},
          {"is_weighted", at::tensor(weighted).to(at::kBool)}};
}

/// The parameters of the surgery by name, where they lie in `weights`: no copies, and no share in the mapping.
inline std::vector<std::pair<std::string, at::Tensor>> view_parameters(const Manifest& manifest,
                                                                       const at::Tensor& weights) {
  std::vector<std::pair<std::string, at::Tensor>> views;
  for (const Parameter& parameter : parameters_of(manifest)) {
    auto* start = static_cast<char*>(weights.data_ptr()) + parameter.offset_bytes;
    views.emplace_back(parameter.name, at::from_blob(start, parameter.dims, parameter_type(parameter.dtype).type));
  }
  return views;
}

/// A tensor as a list of Python.
inline std::string spell(const at::Tensor& tensor) {
  if (tensor.dim() == 0) {
    if (tensor.scalar_type() == at::kBool) return tensor.item<bool>() ? "True" : "False";
    return tensor.is_floating_point() ? c10::str(tensor.item<double>()) : text(tensor.item<std::int64_t>());
  }
  std::vector<std::string> items;
  for (const at::Tensor& item : tensor.unbind()) items.push_back(spell(item));
  return text("[", join(items), "]");
}

class TorchScriptBackend final : public Backend {
 public:
  explicit TorchScriptBackend(GraphSource source)
      : weights_(source.weights), module_(read(source)), forward_(find_forward(source)) {
    attach_surgery(source);
    module_.setattr("weights", weights_);
  }

  c10::IValue run(const Request& request) const override {
    std::vector<c10::IValue> inputs = {request.values, request.lengths};
    if (request.per_sample_weights) inputs.emplace_back(*request.per_sample_weights);
    return forward_(std::move(inputs));
  }

 private:
  static torch::jit::Module read(GraphSource& source) {
    const Graph& graph = source.graph;
    torch::jit::Module module;
    try {
      std::istringstream stream(std::move(source.bytes));
      module = torch::jit::load(stream, at::kCPU);
      module.eval();
    } catch (const std::exception& error) {
      throw GraphError(text(graph.path, " cannot be loaded: ", last_line(error), "; ", versions(graph)));
    }
    if (!module.hasattr("weights") || !module.attr("weights").isTensor() ||
        module.attr("weights").toTensor().scalar_type() != at::kByte) {
      throw GraphError(
          text(graph.path, " has no uint8 attribute 'weights' to attach the rows to; build the artifact again"));
    }
    std::vector<std::pair<std::string, at::Tensor>> expected = graph_constants(source.manifest);
    expected.emplace(expected.begin(), "weights_bytes", at::scalar_tensor(source.manifest.weights_bytes, at::kLong));
    for (const auto& [name, constant] : expected) {
      const std::string found = spell_attribute(module, name);
      if (found != spell(constant)) {
        throw GraphError(text(graph.path, " was built for other rows: its ", name, " is ", found,
                              ", the manifest says ", spell(constant)));
      }
    }
    return module;
  }

  static std::string spell_attribute(const torch::jit::Module& module, const std::string& name) {
    if (!module.hasattr(name)) return "None";
    const c10::IValue value = module.attr(name);
    if (value.isTensor()) return spell(value.toTensor());
    return value.isInt() ? text(value.toInt()) : value.tagKind();
  }

  /// Makes the mapped parameters those of the graph's surgery; placeholders stand in the file for them.
  void attach_surgery(const GraphSource& source) {
    const Manifest& manifest = source.manifest;
    if (!manifest.surgery && !module_.hasattr("surgery")) return;
    std::vector<std::string> names, dims, keys;
    if (manifest.surgery) {
      names = names_of(manifest.features, &Feature::name);
      keys = names_of(manifest.outputs, &Output::key);
      for (const Feature& feature : manifest.features) {
        dims.push_back(std::to_string(manifest.table(feature.table)->embedding_dim));
      }
    }
    const auto spell_list = [&](const char* name) -> std::string {
      if (!module_.hasattr("surgery")) return "None";
      const torch::jit::Module splice = module_.attr("surgery").toModule();
      if (!splice.hasattr(name) || !splice.attr(name).isList()) return "None";
      std::vector<std::string> items;
      for (const c10::IValue& item : splice.attr(name).toListRef()) {
        items.push_back(item.isString() ? quote(item.toStringRef()) : item.isInt() ? text(item.toInt()) : "None");
      }
      return text("[", join(items), "]");
    };
    const std::vector<std::pair<const char*, std::string>> expected = {
        {"feature_names", quote_list(names)},
        {"feature_dims", text("[", join(dims), "]")},
        {"output_keys", quote_list(keys)}};
    for (const auto& [name, wanted] : expected) {
      const std::string said = manifest.surgery ? wanted : "None";
      if (spell_list(name) != said) {
        throw GraphError(text(source.graph.path, " was built for another surgery: its ", name, " is ",
                              spell_list(name), ", the manifest says ", said));
      }
    }
    for (const auto& [name, tensor] : view_parameters(manifest, weights_)) attach_parameter(source, name, tensor);
  }

  void attach_parameter(const GraphSource& source, const std::string& name, const at::Tensor& tensor) const {
    torch::jit::Module owner = module_.attr("surgery").toModule();
    std::istringstream parts("module." + name);
    std::string part;
    std::getline(parts, part, '.');
    bool found = true;
    for (std::string next; found && std::getline(parts, next, '.'); part = next) {
      found = owner.hasattr(part) && owner.attr(part).isModule();
      if (found) owner = owner.attr(part).toModule();
    }
    const at::Tensor old = found && owner.hasattr(part) && owner.attr(part).isTensor() ? owner.attr(part).toTensor()
                                                                                      : at::Tensor();
    if (!old.defined() || old.sizes() != tensor.sizes() || old.scalar_type() != tensor.scalar_type()) {
      throw GraphError(text(source.graph.path, " was built for another surgery: it has no '", name, "' of ",
                            c10::str(tensor.sizes(), " ", tensor.scalar_type())));
    }
    owner.setattr(part, tensor);
  }

  torch::jit::Method find_forward(const GraphSource& source) const {
    const std::optional<torch::jit::Method> forward = module_.find_method("forward");
    if (!forward) throw GraphError(source.graph.path + " has no method 'forward'; build the artifact again");
    return *forward;
  }

  at::Tensor weights_;  // owns the mapping, of which the parameters are views
  torch::jit::Module module_;
  torch::jit::Method forward_;
};

/// The flags of /proc/cpuinfo, empty where it cannot be read.
inline std::set<std::string> cpu_flags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("flags")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

/// Makes sure that this machine has an instruction set, a level of the x86-64 psABI, before code that needs it is
/// opened.
inline void check_isa(const Graph& graph) {
  std::set<std::string> needed = {"avx",   "avx2",  "bmi1",   "bmi2",   "f16c",  "fma",    "abm",
                                  "movbe", "xsave", "sse4_1", "sse4_2", "ssse3", "popcnt", "cx16"};
  const std::set<std::string> of_v4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"};
  const std::string advice = "; use the backend torchscript, or build with another isa";
  if (graph.isa == "x86-64-v4") {
    needed.insert(of_v4.begin(), of_v4.end());
  } else if (graph.isa != "x86-64-v3") {
    throw UnsupportedError(text(graph.path, " instruction set '", graph.isa.value_or(""),
                                "' is unknown; known: x86-64-v3, x86-64-v4", advice));
  }
  const std::set<std::string> flags = cpu_flags();
  std::vector<std::string> lacking;
  std::set_difference(needed.begin(), needed.end(), flags.begin(), flags.end(), std::back_inserter(lacking));
  if (!lacking.empty()) {
    throw UnsupportedError(
        text(graph.path, " needs a CPU of ", *graph.isa, "; this one lacks ", join(lacking), advice));
  }
}

/// A compiled graph: a shared library whose constants lie outside of it. It is opened by its path, in the folder of the
/// artifact, so that torch unpacks nothing; between the check of its digest and that, the artifact must not change.
class AotInductorBackend final : public Backend {
 public:
  explicit AotInductorBackend(const GraphSource& source) : weights_(source.weights) {
    const Graph& graph = source.graph;
    check_isa(graph);
    for (const auto& [name, constant] : graph_constants(source.manifest)) constants_[name] = constant;
    const auto features = static_cast<std::int64_t>(source.manifest.features.size());
    // torch never lets go of what it is fed: it gets the address of the rows, and their mapping stays ours to end.
    constants_["weights"] = at::from_blob(weights_.data_ptr(), weights_.sizes(), weights_.options());
    constants_["weights_placements"] = at::full({features}, 3, at::kInt);  // FBGEMM's EmbeddingLocation.HOST
    std::vector<std::int64_t> columns;  // the feature of every output column; only mean pooling reads it
    if (constants_["is_mean"].any().item<bool>()) {
      for (std::int64_t feature = 0; feature < features; ++feature) {
        const Table& table = *source.manifest.table(source.manifest.features[static_cast<std::size_t>(feature)].table);
        columns.insert(columns.end(), static_cast<std::size_t>(table.embedding_dim), feature);
      }
    }
    constants_["column_features"] = at::tensor(columns, at::kLong);
    for (const auto& [name, view] : view_parameters(source.manifest, weights_)) {
      constants_["surgery.module." + name] = view;
    }
    try {
      const auto runners = std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, kMostRunners);
      loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
          std::filesystem::absolute(source.artifact + detour() + "/" + graph.path).string(), "model", false, runners);
      attach(graph, source.manifest);
    } catch (const ArtifactError&) {
      throw;
    } catch (const std::exception& error) {
      throw GraphError(text(graph.path, " cannot be loaded: ", last_line(error), "; ", versions(graph)));
    }
  }

  c10::IValue run(const Request& request) const override {
    std::vector<at::Tensor> inputs = {request.values, request.lengths};
    if (request.per_sample_weights) inputs.push_back(*request.per_sample_weights);
    std::vector<at::Tensor> outputs = loader_->run(inputs);
    if (outputs.size() == 1) return outputs.front();
    return outputs;
  }

 private:
  static constexpr std::size_t kMostRunners = 16;  // each serves a thread at a time

  /// A part of a path that leads nowhere else, another one at every call. The dynamic linker takes a path that it has opened
  /// before for the library that it opened there, whatever is there now; under a new path it compares the files.
  static std::string detour() {
    static std::atomic<std::uint64_t> loads = 0;
    std::string path;
    for (std::uint64_t number = ++loads; number > 0; number /= 2) path += number % 2 ? "/weights/.." : "/.";
    return path;
  }

  /// Feeds the constants. torch does not check what it is fed: sizes and types are right here or nowhere.
  void attach(const Graph& graph, const Manifest& manifest) {
    std::unordered_map<std::string, at::Tensor> fed;
    bool known = true;
    const std::vector<std::string> names = loader_->get_constant_fqns();
    for (const std::string& name : names) {
      const auto constant = constants_.find(name);
      known = known && constant != constants_.end();
      if (known) fed.insert(*constant);
    }
    const bool means = std::any_of(manifest.features.begin(), manifest.features.end(),
                                   [](const Feature& feature) { return feature.pooling == "mean"; });
    if (!known || !fed.contains("weights") || fed.contains("column_features") != means) {
      const std::set<std::string> sorted(names.begin(), names.end());
      throw GraphError(text(graph.path, " was built for other rows: its constants are ", join(sorted)));
    }
    loader_->load_constants(fed, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  // The graph has the addresses of these, which therefore are destroyed after it.
  at::Tensor weights_;
  std::unordered_map<std::string, at::Tensor> constants_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

inline const Graph& choose_graph(const Manifest& manifest, const std::string& backend) {
  if (backend == "onnx") {
    throw UnsupportedError("an ONNX graph is not for this loader: open model.onnx with ONNX Runtime");
  }
  std::vector<std::string> has;
  for (const Graph& graph : manifest.graphs) {
    if (graph.backend == backend && graph.target == "cpu") return graph;
    has.push_back(graph.backend + " for " + graph.target);
  }
  throw UnsupportedError(text("the artifact has no graph '", backend, "' for device 'cpu'; it has: ", join(has)));
}

/// Opens FBGEMM's libraries, which register their operators as they are opened, and keeps them open: a process that has
/// run an operator cannot let go of it.
inline void load_operators(const Graph& graph, const std::string& folder) {
  if (folder.empty()) {
    throw GraphError(text(graph.path, " needs FBGEMM's operators (", join(graph.operator_libraries),
                          "), and no folder was given; set Options::operator_folder"));
  }
  for (const std::string& name : graph.operator_libraries) {
    const std::string library = folder + "/" + name + ".so";
    if (!::dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
      throw GraphError(
          text(graph.path, " needs ", library, ", which cannot be loaded: ", ::dlerror(), "; ", versions(graph)));
    }
  }
}

inline std::unique_ptr<const Backend> make_backend(GraphSource source) {
  if (source.graph.backend == "aot_inductor") return std::make_unique<AotInductorBackend>(source);
  return std::make_unique<TorchScriptBackend>(std::move(source));
}

// --- The artifact ----------------------------------------------------------------------------------------------------

struct State {
  std::string path;
  Manifest manifest;
  RequestChecker checker;
  std::unique_ptr<const Backend> backend;

  at::Tensor run(const Request& request) const {
    // Not InferenceMode: a caller could then not change the answer in place outside of it.
    const at::NoGradGuard no_grad;
    return backend->run(request).toTensor();
  }
};

/// Runs the graph until TorchScript has specialised it: the first two calls take some 50 ms.
inline void warm_up(const Manifest& manifest, const Graph& graph, const Backend& backend) {
  const auto features = static_cast<std::int64_t>(manifest.features.size());
  Request request{at::zeros({features}, at::kLong), at::ones({features}, at::kInt), std::nullopt};
  if (manifest.weighted) request.per_sample_weights = at::ones({features}, at::kFloat);
  const std::int64_t width = manifest.outputs.back().end_column;
  for (int i = 0; i < 3; ++i) {
    c10::IValue pooled;
    try {
      const at::NoGradGuard no_grad;
      pooled = backend.run(request);
    } catch (const std::exception& error) {
      throw GraphError(text(graph.path, " does not run on the manifest's features: ", last_line(error)));
    }
    if (!pooled.isTensor()) throw GraphError(text(graph.path, " gives a ", pooled.tagKind(), ", expected a tensor"));
    const at::Tensor& tensor = pooled.toTensor();
    if (tensor.sizes() != at::IntArrayRef({1, width}) || tensor.scalar_type() != at::kFloat) {
      throw GraphError(text(graph.path, " gives ", c10::str(tensor.sizes(), " ", tensor.scalar_type()),
                            ", expected [1, ", width, "] float32"));
    }
  }
}

}  // namespace detail

inline const Table* Manifest::table(std::string_view name) const {
  const auto found = std::find_if(tables.begin(), tables.end(), [&](const Table& table) { return table.name == name; });
  return found == tables.end() ? nullptr : &*found;
}

inline const File* Manifest::file(std::string_view path) const {
  const auto found = std::find_if(files.begin(), files.end(), [&](const File& file) { return file.path == path; });
  return found == files.end() ? nullptr : &*found;
}

inline bool Manifest::is_mapped(std::string_view path) const {
  return path == detail::kWeights ||
         std::any_of(vocabularies.begin(), vocabularies.end(),
                     [&](const StoredVocabulary& vocabulary) { return vocabulary.path == path; });
}

inline const Manifest& Artifact::manifest() const { return state_->manifest; }

inline at::Tensor Artifact::lookup(const at::Tensor& values, const at::Tensor& lengths,
                                   const std::optional<at::Tensor>& per_sample_weights) const {
  return state_->run(state_->checker.check(values, lengths, per_sample_weights));
}

inline std::string Artifact::read_file(const std::string& path) const {
  const File* file = manifest().file(path);
  if (!file || manifest().is_mapped(path)) {
    throw MissingFileError(detail::text(state_->path, ": has no small file '", path, "' in its manifest"));
  }
  std::string data = detail::read_whole(state_->path + "/" + path);
  const std::string mismatch = detail::describe_mismatch(*file, data);
  if (!mismatch.empty()) {
    throw DigestMismatchError(detail::text(state_->path, ": ", mismatch, "; restore the files or build again"));
  }
  return data;
}

inline Artifact load(const std::string& path, const Options& options) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (!std::filesystem::is_directory(status)) {
    const char* what = std::filesystem::exists(status) ? "is no folder" : "no such folder";
    throw MissingFileError(detail::text(path, ": ", what, "; give the folder that 'export build' wrote"));
  }
  Manifest manifest = detail::read_manifest(path);
  detail::check_files(path, manifest);
  const auto wanted = std::find_if(manifest.graphs.begin(), manifest.graphs.end(),
                                   [&](const Graph& graph) { return graph.backend == options.backend; });
  std::string bytes =
      detail::read_small_files(path, manifest, wanted == manifest.graphs.end() ? std::string() : wanted->path);
  const detail::WeightFile weights = detail::open_weights(path, manifest);
  std::vector<detail::VocabularyFile> vocabularies;
  for (const StoredVocabulary& vocabulary : manifest.vocabularies) {
    vocabularies.push_back(detail::open_vocabulary(path, vocabulary));
  }
  if (options.verify_digests) {
    const int all = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U));
    const int threads = options.threads > 0 ? options.threads : all;
    weights.compare_digests(manifest.file(detail::kWeights)->digest, threads);
    for (std::size_t i = 0; i < vocabularies.size(); ++i) {
      vocabularies[i].compare_digests(manifest.file(manifest.vocabularies[i].path)->digest, threads);
    }
  }
  const Graph& graph = detail::choose_graph(manifest, options.backend);
  detail::load_operators(graph, options.operator_folder);
  std::unique_ptr<const detail::Backend> backend =
      detail::make_backend({path, manifest, graph, std::move(bytes), weights.map()});
  detail::warm_up(manifest, graph, *backend);
  detail::RequestChecker checker(manifest, options.invalid_ids);
  return Artifact(std::make_shared<const detail::State>(
      detail::State{path, std::move(manifest), std::move(checker), std::move(backend)}));
}

}  // namespace large_embeddings
