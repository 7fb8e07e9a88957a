#include "tests/fuzz/mutators.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include <fmt/format.h>
#include <hdf5.h>

#include "core/file.h"

namespace moraine::fuzz {
namespace {

using core::Json;

// What no JSON value can be. mutate_json_text puts these texts in the document and replaces them, quotes and all.
struct Unspeakable {
  std::string marker, text;
};
const std::vector<Unspeakable>& unspeakables() {
  constexpr size_t kDeep = 20000;
  static const std::vector<Unspeakable> list = {
      {"@nan@", "NaN"},
      {"@huge@", "1e999"},
      {"@wide@", "123456789012345678901234567890"},
      {"@bytes@", "\"\xff\xfe\xc3\x28\""},
      {"@surrogate@", "\"\\ud800\""},
      {"@deep@", std::string(kDeep, '[') + std::string(kDeep, ']')},
      {"@maps@",
       [] {
         std::string text;
         for (size_t i = 0; i < kDeep; ++i) text += "{\"a\":";
         return text + "1" + std::string(kDeep, '}');
       }()},
  };
  return list;
}

const std::vector<Json>& numbers() {
  static const std::vector<Json> list = {
      0,
      1,
      -1,
      2,
      7,
      255,
      0.5,
      -0.5,
      1e308,
      -1e308,
      5e-324,
      std::numeric_limits<int32_t>::max(),
      int64_t{1} << 31,
      int64_t{1} << 32,
      (int64_t{1} << 53) + 1,
      int64_t{1} << 62,
      std::numeric_limits<int64_t>::max(),
      std::numeric_limits<int64_t>::min(),
      std::numeric_limits<uint64_t>::max(),
  };
  return list;
}

const std::vector<std::string>& texts() {
  static const std::vector<std::string> list = {
      "",       " ",      "0",      "-1",   "null",     "true",     "../../../tmp/evil",
      "/",      ".",      "..",     "a/b",  "%s%n",     "a\nb",     std::string("a\0b", 3),
      "(((((a", "(a*)*b", "[",      "\\",   "\xc3\xa4", "constant", std::string(70000, 'x'),
      "nan",    "1e308",  "public", "cuda", "bfloat16", "${name}",  std::string(64, '0'),
  };
  return list;
}

// Every value of a document, with what holds it.
struct Place {
  Json* parent = nullptr;
  std::string key;   // of an object
  size_t index = 0;  // of a list
  Json* value = nullptr;
};

void collect(Json& value, const Place& place, std::vector<Place>& out) {
  out.push_back(place);
  if (value.is_object()) {
    for (auto& [key, part] : value.items()) collect(part, {&value, key, 0, &part}, out);
  } else if (value.is_array()) {
    for (size_t i = 0; i < value.size(); ++i) collect(value[i], {&value, "", i, &value[i]}, out);
  }
}

std::vector<Place> places_of(Json& document) {
  std::vector<Place> places;
  collect(document, {nullptr, "", 0, &document}, places);
  return places;
}

Json other_value(const Json& value, Random& random) {
  switch (random.below(9)) {
    case 0:
      return random.pick(numbers());
    case 1:
      return random.pick(texts());
    case 2:
      return nullptr;
    case 3:
      return random.once_in(2);
    case 4:
      return Json::array();
    case 5:
      return Json::object();
    case 6:
      return Json::array({value, value});
    case 7:
      return value.is_number() ? Json(value.dump()) : Json{{"name", value}};
    default:
      if (value.is_number_integer()) return value.get<int64_t>() + (random.once_in(2) ? 1 : -1);
      if (value.is_string()) return value.get<std::string>() + random.pick(texts());
      return random.pick(numbers());
  }
}

void change_members(Json& parent, const Place& place, Random& random) {
  if (parent.is_array()) {
    const auto at = parent.begin() + static_cast<Json::difference_type>(place.index);
    switch (random.below(3)) {
      case 0:
        parent.erase(at);
        return;
      case 1:
        parent.insert(at, Json(*at));
        return;
      default:
        std::reverse(parent.begin(), parent.end());
        return;
    }
  }
  const Json value = parent.at(place.key);
  switch (random.below(3)) {
    case 0:
      parent.erase(place.key);
      return;
    case 1:
      parent.erase(place.key);
      parent[random.once_in(2) ? place.key + "_" : random.pick(texts())] = value;
      return;
    default:
      parent[random.once_in(2) ? place.key + "2" : random.pick(texts())] = value;
      return;
  }
}

void change_once(Json& document, Random& random) {
  const std::vector<Place> places = places_of(document);
  const Place& place = random.pick(places);
  if (place.parent && random.once_in(4)) return change_members(*place.parent, place, random);
  if (random.once_in(8)) {
    const Json other = *random.pick(places).value;  // a copy: one may lie inside the other
    *place.value = other;
    return;
  }
  *place.value =
      place.value->is_number() && random.once_in(2) ? random.pick(numbers()) : other_value(*place.value, random);
}

std::string dump(const Json& document, int indent = -1) {
  return document.dump(indent, ' ', false, Json::error_handler_t::replace);
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  size_t start = 0;
  for (size_t end; (end = text.find('\n', start)) != std::string::npos; start = end + 1)
    lines.push_back(text.substr(start, end - start));
  if (start < text.size()) lines.push_back(text.substr(start));
  return lines;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const auto& line : lines) text += line + "\n";
  return text;
}

void edit_once(std::string& bytes, Random& random) {
  constexpr size_t kLongest = 64;
  if (bytes.empty()) {
    bytes = std::string(1 + random.below(kLongest), static_cast<char>(random.below(256)));
    return;
  }
  const size_t at = random.below(bytes.size());
  const size_t length = std::min(1 + random.below(kLongest), bytes.size() - at);
  switch (random.below(8)) {
    case 0:
    case 1:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
      return;
    case 2:
      bytes.erase(at, length);
      return;
    case 3:
      bytes.insert(at, std::string(length, static_cast<char>(random.below(256))));
      return;
    case 4:
      bytes.insert(at, bytes.substr(at, length));
      return;
    case 5:
      bytes.resize(at);
      return;
    case 6: {
      const size_t other = random.below(bytes.size());
      for (size_t i = 0; i < length && other + i < bytes.size(); ++i) std::swap(bytes[at + i], bytes[other + i]);
      return;
    }
    default:
      std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), length, random.once_in(2) ? '\0' : '\xff');
      return;
  }
}

}  // namespace

std::string mutate_bytes(std::string bytes, Random& random) {
  for (size_t edits = 1 + random.below(4); edits > 0; --edits) edit_once(bytes, random);
  return bytes;
}

core::Json mutate_json(core::Json document, Random& random) {
  for (size_t changes = 1 + random.below(2); changes > 0; --changes) change_once(document, random);
  return document;
}

std::string mutate_json_text(const std::string& text, Random& random) {
  if (random.once_in(4)) return mutate_bytes(text, random);
  std::vector<std::string> lines = lines_of(text);
  const bool one_document = Json::accept(text);
  if (!one_document && lines.empty()) return mutate_bytes(text, random);
  const size_t line = one_document ? 0 : random.below(lines.size());
  const std::string& part = one_document ? text : lines[line];
  if (!Json::accept(part)) return mutate_bytes(text, random);
  Json document = Json::parse(part);
  std::string changed;
  if (random.once_in(4)) {
    const Unspeakable& what = random.pick(unspeakables());
    *random.pick(places_of(document)).value = what.marker;
    changed = dump(document, 1);
    const std::string quoted = "\"" + what.marker + "\"";
    changed.replace(changed.find(quoted), quoted.size(), what.text);
  } else {
    changed = dump(mutate_json(std::move(document), random), one_document ? 1 : -1);
  }
  if (one_document) return changed + "\n";
  lines[line] = changed;
  return joined(lines);
}

std::string mutate_yaml(const std::string& text, Random& random) {
  static const std::vector<std::string> values = {"0",
                                                  "-1",
                                                  "1e308",
                                                  "9223372036854775808",
                                                  "0x10",
                                                  "010",
                                                  ".nan",
                                                  "~",
                                                  "[]",
                                                  "{}",
                                                  "[[[[]]]]",
                                                  "{a: {b: c}}",
                                                  "!!binary",
                                                  "!x 1",
                                                  "&a [*a]",
                                                  "*a",
                                                  "${seed}",
                                                  "${",
                                                  "${env:HOME}",
                                                  "\"\xff\xfe\"",
                                                  "'",
                                                  "\"",
                                                  "| \n  a",
                                                  "%",
                                                  "@",
                                                  "true",
                                                  "\"null\"",
                                                  "${train}",
                                                  "../..",
                                                  "\xef\xbb\xbf",
                                                  "? a",
                                                  "- - - a",
                                                  std::string(3000, '['),
                                                  std::string(3000, '{'),
                                                  std::string(70000, 'y')};
  if (random.once_in(4)) return mutate_bytes(text, random);
  std::vector<std::string> lines = lines_of(text);
  for (size_t edits = 1 + random.below(2); edits > 0 && !lines.empty(); --edits) {
    const size_t at = random.below(lines.size());
    std::string& line = lines[at];
    switch (random.below(7)) {
      case 0:
        lines.erase(lines.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      case 1:
        lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(at), std::string(line));
        break;
      case 2:
        std::swap(line, lines[random.below(lines.size())]);
        break;
      case 3:
        line = (random.once_in(2) ? "  " : "\t") + line;
        break;
      case 4:
        line += " " + random.pick(values);
        break;
      default: {  // a value between two of ": ", ", ", "}" becomes another
        std::vector<size_t> starts;
        for (size_t i = line.find(": "); i != std::string::npos; i = line.find(": ", i + 1)) starts.push_back(i + 2);
        if (starts.empty()) break;
        const size_t start = random.pick(starts);
        line.replace(start, line.find_first_of(",}]", start) - start, random.pick(values));
      }
    }
  }
  return joined(lines);
}

std::string mutate_safetensors(const std::string& file, Random& random) {
  uint64_t length = 0;
  if (file.size() < sizeof length || random.once_in(4)) return mutate_bytes(file, random);
  std::memcpy(&length, file.data(), sizeof length);
  if (length > file.size() - sizeof length) return mutate_bytes(file, random);
  std::string header = file.substr(sizeof length, length);
  Json document = Json::parse(header, nullptr, false);
  if (document.is_discarded()) return mutate_bytes(file, random);
  const auto metadata = document.find("__metadata__");
  if (metadata != document.end() && metadata->is_object() && metadata->contains("moraine") && random.once_in(2)) {
    Json& inner = (*metadata)["moraine"];
    inner = mutate_json_text(inner.get<std::string>(), random);
    header = dump(document);
  } else {
    header = mutate_json_text(header, random);
  }
  switch (random.below(8)) {
    case 0:
      length = random.once_in(2) ? ~uint64_t{0} >> random.below(64) : random.below(1000);
      break;
    case 1:
      length = header.size() + 1 + random.below(64);
      break;
    default:
      length = header.size();
  }
  std::string out(sizeof length, '\0');
  std::memcpy(out.data(), &length, sizeof length);
  return out + header + file.substr(sizeof length + std::min<size_t>(file.size() - sizeof length, [&] {
                                      uint64_t old = 0;
                                      std::memcpy(&old, file.data(), sizeof old);
                                      return old;
                                    }()));
}

namespace {

// The data sets and attributes of a file, and the calls of the library on them, all of which may fail.
struct Hdf5 {
  hid_t file;
  std::vector<std::string> datasets, attributes;

  explicit Hdf5(const std::filesystem::path& path) {
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    if (file < 0) return;
    const H5O_iterate_t note = [](hid_t, const char* name, const H5O_info_t* info, void* out) -> herr_t {
      if (info->type == H5O_TYPE_DATASET) static_cast<std::vector<std::string>*>(out)->emplace_back(name);
      return 0;
    };
    H5Ovisit2(file, H5_INDEX_NAME, H5_ITER_INC, note, &datasets, H5O_INFO_BASIC);
    const H5A_operator2_t attribute = [](hid_t, const char* name, const H5A_info_t*, void* out) -> herr_t {
      static_cast<std::vector<std::string>*>(out)->emplace_back(name);
      return 0;
    };
    H5Aiterate2(file, H5_INDEX_NAME, H5_ITER_INC, nullptr, attribute, &attributes);
  }
  ~Hdf5() {
    if (file >= 0) H5Fclose(file);
  }
  Hdf5(const Hdf5&) = delete;
  Hdf5& operator=(const Hdf5&) = delete;

  void set_attribute(const std::string& name, hid_t type, hid_t space, const void* value) const {
    H5Adelete(file, name.c_str());
    const hid_t attribute = H5Acreate2(file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
  }
  void set_text(const std::string& name, const std::string& value, bool fixed) const {
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, fixed ? std::max<size_t>(1, value.size()) : H5T_VARIABLE);
    const char* pointer = value.c_str();
    set_attribute(name, type, H5Screate(H5S_SCALAR), fixed ? static_cast<const void*>(pointer) : &pointer);
    H5Tclose(type);
  }
  // Chunked, without a single chunk: extents cost nothing.
  void make_dataset(const std::string& name, hid_t type, const std::vector<hsize_t>& shape) const {
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t layout = H5Pcreate(H5P_DATASET_CREATE);
    std::vector<hsize_t> chunk(shape.size());
    std::transform(shape.begin(), shape.end(), chunk.begin(),
                   [](hsize_t side) { return std::clamp<hsize_t>(side, 1, 16); });
    if (!chunk.empty()) H5Pset_chunk(layout, static_cast<int>(chunk.size()), chunk.data());
    H5Dclose(H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, layout, H5P_DEFAULT));
    H5Pclose(layout);
    H5Sclose(space);
  }
};

void change_attribute(const Hdf5& in, Random& random) {
  const std::string name = random.pick(in.attributes);
  switch (random.below(6)) {
    case 0:
      H5Adelete(in.file, name.c_str());
      return;
    case 1:
      in.set_text(name, random.pick(texts()), random.once_in(2));
      return;
    case 2: {
      const Json& number = random.pick(numbers());
      const auto value = number.is_number_integer() ? number.get<int64_t>() : 3;
      in.set_attribute(name, H5T_NATIVE_INT64, H5Screate(H5S_SCALAR), &value);
      return;
    }
    case 3: {
      const double value = random.pick(numbers()).get<double>();
      in.set_attribute(name, H5T_NATIVE_DOUBLE, H5Screate(H5S_SCALAR), &value);
      return;
    }
    case 4: {
      const int64_t values[2] = {1, 1};
      const hsize_t sides[1] = {2};
      in.set_attribute(name, H5T_NATIVE_INT64, H5Screate_simple(1, sides, nullptr), values);
      return;
    }
    default:
      in.set_attribute(name, H5T_NATIVE_INT64, H5Screate(H5S_NULL), nullptr);
  }
}

void change_dataset(const Hdf5& in, Random& random) {
  const std::string name = random.pick(in.datasets);
  const std::vector<hid_t> types = {H5T_NATIVE_UINT8,  H5T_NATIVE_INT8,  H5T_NATIVE_UINT16, H5T_NATIVE_INT64,
                                    H5T_NATIVE_UINT64, H5T_NATIVE_FLOAT, H5T_NATIVE_DOUBLE, H5T_C_S1};
  const std::vector<hsize_t> sides = {0, 1, 2, 7, 600, hsize_t{1} << 31, hsize_t{1} << 40, hsize_t{1} << 62};
  H5Ldelete(in.file, name.c_str(), H5P_DEFAULT);
  switch (random.below(6)) {
    case 0:
      return;
    case 1:
      H5Gclose(H5Gcreate2(in.file, name.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
      return;
    case 2:
      H5Lcreate_soft(random.pick(in.datasets).c_str(), in.file, name.c_str(), H5P_DEFAULT, H5P_DEFAULT);
      return;
    case 3:
      H5Lcreate_external("nowhere.h5", "/x", in.file, name.c_str(), H5P_DEFAULT, H5P_DEFAULT);
      return;
    default: {
      std::vector<hsize_t> shape(random.below(5));
      for (auto& side : shape) side = random.pick(sides);
      in.make_dataset(name, random.pick(types), shape);
    }
  }
}

}  // namespace

void mutate_hdf5(const std::filesystem::path& file, Random& random) {
  if (random.once_in(3)) {
    core::write_atomically(file, mutate_bytes(core::read_text(file), random));
    return;
  }
  const Hdf5 opened(file);
  if (opened.file < 0) return;
  if (!opened.attributes.empty() && random.once_in(2))
    change_attribute(opened, random);
  else if (!opened.datasets.empty())
    change_dataset(opened, random);
}

}  // namespace moraine::fuzz
