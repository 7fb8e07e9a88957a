#include "data/text_dataset.h"

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/hdf5.h"
#include "data/fingerprint.h"
#include "tests/temporary_directory.h"

namespace moraine::data {
namespace {

using core::Hdf5File;
using testing::HasSubstr;
using Tokens = std::vector<int64_t>;

constexpr int64_t E = ByteTokenizer::kEndOfDocument;
const std::string kOfContent = "of the content";

/// The parts of a domain file with one split, each of which a test may spoil.
struct Parts {
  std::string format = "moraine-text-domain", tokenizer = ByteTokenizer::kName, fingerprint = kOfContent,
              split = "train";
  int64_t version = 1, vocab_size = ByteTokenizer::kVocabSize;
  Tokens tokens, documents, byte_offsets;
};

Parts byte_parts(const std::vector<std::string>& texts) {
  Parts parts;
  parts.documents = {0};
  for (const auto& text : texts) {
    for (const int64_t token : ByteTokenizer::encode(text)) parts.tokens.push_back(token);
    parts.tokens.push_back(E);
    parts.documents.push_back(static_cast<int64_t>(parts.tokens.size()));
  }
  return parts;
}

class TextDatasetTest : public testing::Test {
 protected:
  std::filesystem::path write(const Parts& parts) {
    const auto path = folder_ / "domain.h5";
    Hdf5File file(path, Hdf5File::Mode::kCreate);
    const std::vector<uint16_t> tokens(parts.tokens.begin(), parts.tokens.end());
    file.write<uint16_t>(parts.split + "/tokens", tokens, {static_cast<int64_t>(tokens.size())});
    file.write<int64_t>(parts.split + "/documents", parts.documents, {static_cast<int64_t>(parts.documents.size())});
    if (!parts.byte_offsets.empty())
      file.write<int64_t>(parts.split + "/byte_offsets", parts.byte_offsets,
                          {static_cast<int64_t>(parts.byte_offsets.size())});
    file.set_attribute("format", parts.format);
    file.set_attribute("format_version", parts.version);
    file.set_attribute("name", std::string("tiny"));
    file.set_attribute("tokenizer", parts.tokenizer);
    file.set_attribute("vocab_size", parts.vocab_size);
    file.set_attribute("end_of_document", E);
    if (!parts.fingerprint.empty())
      file.set_attribute("fingerprint", parts.fingerprint == kOfContent ? text_fingerprint(file) : parts.fingerprint);
    return path;
  }
  TextDataset open(const Parts& parts, int64_t seq_len) {
    return TextDataset::open(write(parts), parts.split, seq_len);
  }

  /// The message of the UserError that opening must end with.
  std::string refusal(const Parts& parts, int64_t seq_len = 3, const std::string& split = "train",
                      const std::string& tokenizer = "") {
    try {
      TextDataset::open(write(parts), split, seq_len, tokenizer);
    } catch (const core::UserError& error) {
      EXPECT_FALSE(error.hint().empty());
      return error.what();
    }
    return "it was opened";
  }

  TemporaryDirectory folder_;
  const Parts two_documents_ = byte_parts({"abc", "de"});  // a b c E d e E
};

/// 40 documents of 0 to 77 bytes.
Parts many_documents() {
  std::vector<std::string> texts;
  for (size_t i = 0; i < 40; ++i) texts.push_back(std::string(i * 37 % 78, static_cast<char>('A' + i % 26)));
  return byte_parts(texts);
}

TEST_F(TextDatasetTest, ReportsWhatTheFileHolds) {
  const TextDataset dataset = open(two_documents_, 3);
  EXPECT_EQ(dataset.info().name, "tiny");
  EXPECT_EQ(dataset.info().tokenizer, "bytes-v1");
  EXPECT_EQ(dataset.info().vocab_size, 257);
  EXPECT_EQ(dataset.info().fingerprint, text_fingerprint(Hdf5File(folder_ / "domain.h5", Hdf5File::Mode::kRead)));
  EXPECT_EQ(dataset.num_tokens(), 7);
}

TEST_F(TextDatasetTest, PacksSequencesThatOverlapByOneToken) {
  const TextDataset dataset = open(two_documents_, 3);
  EXPECT_EQ(dataset.num_sequences(), 2);
  EXPECT_EQ(dataset.num_eval_sequences(), 2);
  EXPECT_EQ(dataset.eval_batch(0, 2), (Tokens{'a', 'b', 'c', E, E, 'd', 'e', E}));
}

TEST_F(TextDatasetTest, DropsTheTailFromTrainingAndPadsItForEvaluation) {
  const TextDataset dataset = open(two_documents_, 4);
  EXPECT_EQ(dataset.num_sequences(), 1);
  EXPECT_EQ(dataset.num_eval_sequences(), 2);
  EXPECT_EQ(dataset.training_rows(1, 0, 2), (Tokens{'a', 'b', 'c', E, 'd', 'a', 'b', 'c', E, 'd'}));
  EXPECT_EQ(dataset.eval_batch(1, 2), (Tokens{'d', 'e', E, -1, -1, -1, -1, -1, -1, -1}));
}

TEST_F(TextDatasetTest, CountsBytesOfPredictedTokensOnly) {
  const TextDataset dataset = open(two_documents_, 4);
  EXPECT_EQ(dataset.eval_bytes(0, 1), 3);  // b c (E) d
  EXPECT_EQ(dataset.eval_bytes(1, 1), 1);  // e (E)
  EXPECT_EQ(dataset.num_bytes(), 4);
}

TEST_F(TextDatasetTest, EvaluationPredictsEveryTokenButTheFirstOnce) {
  const Parts parts = many_documents();
  for (const int64_t seq_len : {1, 2, 7, 64, 500}) {
    const TextDataset dataset = open(parts, seq_len);
    Tokens targets;
    int64_t bytes = 0;
    for (int64_t sequence = 0; sequence < dataset.num_eval_sequences(); ++sequence) {
      const Tokens row = dataset.eval_batch(sequence, 1);
      const Tokens predicted(std::next(row.begin()), std::find(std::next(row.begin()), row.end(), -1));
      EXPECT_EQ(dataset.eval_bytes(sequence, 1),
                std::count_if(predicted.begin(), predicted.end(), [](int64_t t) { return t != E; }))
          << "sequence " << sequence << " of length " << seq_len;
      targets.insert(targets.end(), predicted.begin(), predicted.end());
      bytes += dataset.eval_bytes(sequence, 1);
    }
    EXPECT_EQ(targets, Tokens(std::next(parts.tokens.begin()), parts.tokens.end())) << "length " << seq_len;
    EXPECT_EQ(bytes, dataset.num_bytes()) << "length " << seq_len;
  }
}

TEST_F(TextDatasetTest, TakesBytesOfOtherTokenizersFromTheFile) {
  Parts parts;
  parts.tokenizer = "hf:" + std::string(64, '0');
  parts.vocab_size = 12;
  parts.tokens = {3, 5, 11, 7, 11};  // 11 ends a document
  parts.documents = {0, 3, 5};
  parts.byte_offsets = {0, 4, 9, 9, 15, 15};
  const TextDataset dataset = open(parts, 2);
  EXPECT_EQ(dataset.num_bytes(), 11);  // 15 without the first token's 4
  EXPECT_EQ(dataset.eval_bytes(0, 1), 5);
  EXPECT_EQ(dataset.eval_bytes(1, 1), 6);
}

TEST_F(TextDatasetTest, AnEpochHoldsEverySequenceOnce) {
  const TextDataset dataset = open(many_documents(), 16);
  const int64_t epoch = dataset.num_sequences(), width = 17;
  Tokens expected = dataset.eval_batch(0, epoch);
  for (int64_t start : {int64_t{0}, epoch}) {
    std::vector<Tokens> drawn, all;
    for (int64_t i = 0; i < epoch; ++i) {
      drawn.push_back(dataset.training_rows(5, start + i, 1));
      all.emplace_back(expected.begin() + i * width, expected.begin() + (i + 1) * width);
    }
    EXPECT_THAT(drawn, testing::UnorderedElementsAreArray(all)) << "epoch from step " << start;
    EXPECT_NE(drawn, all);
  }
}

TEST_F(TextDatasetTest, EpochsAndSeedsDifferInOrder) {
  const TextDataset dataset = open(many_documents(), 16);
  const int64_t epoch = dataset.num_sequences();
  const Tokens first = dataset.training_rows(5, 0, epoch);
  EXPECT_NE(first, dataset.training_rows(5, epoch, epoch));
  EXPECT_NE(first, dataset.training_rows(6, 0, epoch));
}

TEST_F(TextDatasetTest, AStepOfAFreshReaderEqualsTheSameStepOfALongRun) {
  const Parts parts = many_documents();
  const TextDataset run = open(parts, 16);
  Tokens at_step_41;
  for (int64_t step = 0; step < 42; ++step) at_step_41 = run.training_rows(9, step * 5, 5);  // over several epochs
  const TextDataset resumed = TextDataset::open(folder_ / "domain.h5", "train", 16);
  EXPECT_EQ(resumed.training_rows(9, 41 * 5, 5), at_step_41);
}

TEST_F(TextDatasetTest, ABatchIsTheNextSequencesOfTheStreamAcrossEpochs) {
  const TextDataset dataset = open(many_documents(), 16);
  const int64_t batch = 2 * dataset.num_sequences() + 3;
  Tokens one_by_one;
  for (int64_t step = 0; step < batch; ++step) {
    const Tokens row = dataset.training_rows(3, batch + step, 1);
    one_by_one.insert(one_by_one.end(), row.begin(), row.end());
  }
  EXPECT_EQ(dataset.training_rows(3, batch, batch), one_by_one);
}

TEST_F(TextDatasetTest, RefusesAMissingFile) {
  EXPECT_THROW(TextDataset::open(folder_ / "nowhere.h5", "train", 3), core::UserError);
}

TEST_F(TextDatasetTest, RefusesFilesOfAnotherFormatOrVersion) {
  Parts parts = two_documents_;
  parts.format = "something-else";
  EXPECT_THAT(refusal(parts), HasSubstr("not a text-domain file"));
  parts = two_documents_;
  parts.version = 2;
  EXPECT_THAT(refusal(parts), HasSubstr("version 2"));
}

TEST_F(TextDatasetTest, RefusesAFileWithoutFingerprint) {
  Parts parts = two_documents_;
  parts.fingerprint = "";
  EXPECT_THAT(refusal(parts), HasSubstr("fingerprint"));
}

TEST_F(TextDatasetTest, RefusesTokensEditedUnderTheOldFingerprint) {
  Parts parts = two_documents_;
  parts.fingerprint = open(parts, 3).info().fingerprint;
  EXPECT_EQ(refusal(parts), "it was opened");
  parts.tokens[1] = 'x';
  EXPECT_THAT(refusal(parts), HasSubstr("not what its fingerprint says: " + parts.fingerprint));
  parts.tokens[1] = 'b';
  parts.vocab_size = 300;
  EXPECT_THAT(refusal(parts), HasSubstr("not what its fingerprint says"));
}

TEST_F(TextDatasetTest, RefusesAnotherTokenizer) {
  const std::string message = refusal(two_documents_, 3, "train", "hf:abc");
  EXPECT_THAT(message, HasSubstr("'bytes-v1'"));
  EXPECT_THAT(message, HasSubstr("'hf:abc'"));
}

TEST_F(TextDatasetTest, RefusesSplitsThatAreNotThere) {
  EXPECT_THAT(refusal(two_documents_, 3, "test"), HasSubstr("no split 'test'"));
  EXPECT_THAT(refusal(two_documents_, 3, "trian"), HasSubstr("no split 'trian'"));
}

TEST_F(TextDatasetTest, RefusesASplitShorterThanASequence) {
  EXPECT_THAT(refusal(two_documents_, 7), HasSubstr("7 tokens"));
  EXPECT_EQ(open(two_documents_, 6).num_sequences(), 1);
  EXPECT_THAT(refusal(two_documents_, 0), HasSubstr("must be positive"));
}

TEST_F(TextDatasetTest, RefusesPartsThatContradictEachOther) {
  for (const Tokens& documents : {Tokens{0, 4}, Tokens{1, 7}, Tokens{0, 4, 4, 7}, Tokens{0, 8}}) {
    Parts parts = two_documents_;
    parts.documents = documents;
    EXPECT_THAT(refusal(parts), HasSubstr("documents do not cover the tokens"));
  }
  Parts parts = two_documents_;
  parts.byte_offsets = Tokens(8, 0);
  EXPECT_THAT(refusal(parts), HasSubstr("byte_offsets"));
  parts = two_documents_;
  parts.tokenizer = "hf:abc";
  EXPECT_THAT(refusal(parts), HasSubstr("byte_offsets"));
}

}  // namespace
}  // namespace moraine::data
