// Pages are taken before a step and given back by whoever drops them; see sequence.h for who may call what when.
#include "model/sequence.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"

namespace pyllama {
namespace {

size_t pages_for(size_t n_tok) { return (n_tok + kPageTok - 1) / kPageTok; }

}  // namespace

int PagePool::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int page = backend_->new_page();
  ++in_use_;
  return page;
}

void PagePool::give_back(const int* pages, size_t n_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (in_step_) {
    returned_.insert(returned_.end(), pages, pages + n_pages);
  } else {
    release(pages, n_pages);
  }
}

void PagePool::step_begins() {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = true;
}

void PagePool::step_ended() {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = false;
  release(returned_.data(), returned_.size());
  returned_.clear();
}

int PagePool::pages_in_use() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return in_use_;
}

void PagePool::release(const int* pages, size_t n_pages) {
  for (size_t i = 0; i < n_pages; ++i) backend_->free_page(pages[i]);
  in_use_ -= static_cast<int>(n_pages);
}

Sequence::~Sequence() { keep_pages(0); }

int Sequence::n_past() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(tokens_.size());
}

std::vector<int32_t> Sequence::tokens() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return tokens_;
}

int Sequence::prompt_len() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return prompt_len_;
}

void Sequence::set_prompt_len(int n) {
  check<std::invalid_argument>(n >= 0, "prompt_len is ", n, ", expected 0 or more");
  const std::lock_guard<std::mutex> lock(mutex_);
  prompt_len_ = n;
}

void Sequence::truncate(int n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  check<std::invalid_argument>(n >= 0 && static_cast<size_t>(n) <= tokens_.size(), "cannot truncate to ", n,
                               " tokens, the sequence holds ", tokens_.size());
  tokens_.resize(static_cast<size_t>(n));
  keep_pages(pages_for(tokens_.size()));
}

void Sequence::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  closed_ = true;
  tokens_.clear();
  keep_pages(0);
}

void Sequence::prepare(int n_new) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_idle();
  check<std::invalid_argument>(!closed_, "the sequence is closed");
  const size_t n_tok = tokens_.size() + static_cast<size_t>(n_new);
  const size_t needed = pages_for(n_tok);
  // All memory is had here, so that no page in hand is lost to bad_alloc and commit() cannot fail.
  if (tokens_.capacity() < n_tok) tokens_.reserve(std::max(n_tok, 2 * tokens_.capacity()));
  pages_.reserve(needed);
  try {
    while (pages_.size() < needed) pages_.push_back(pool_->take());
  } catch (...) {
    keep_pages(pages_for(tokens_.size()));
    throw;
  }
  in_step_ = true;
}

void Sequence::commit(const int32_t* new_tokens, int n_new) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  tokens_.insert(tokens_.end(), new_tokens, new_tokens + n_new);
  in_step_ = false;
}

void Sequence::abandon() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  in_step_ = false;
  keep_pages(pages_for(tokens_.size()));
}

void Sequence::check_idle() const {
  check<std::invalid_argument>(!in_step_, "the sequence is in a step that is still running in another thread");
}

void Sequence::keep_pages(size_t n_pages) {
  if (n_pages >= pages_.size()) return;
  pool_->give_back(pages_.data() + n_pages, pages_.size() - n_pages);
  pages_.resize(n_pages);
}

}  // namespace pyllama
