// What changes while a text is generated: its tokens and the pages that hold their keys and values. A Sequence owns its
// pages through the pool it shares with the Model, so either may go first. Which rows a step runs, and when its result
// counts, is forward.cpp's business: a step prepares, and only a step that has succeeded commits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "backend.h"

namespace pyllama {

// The backend's pages, shared by a model and its sequences. Pages that come back while a step runs (another thread
// dropped a sequence) wait until it has ended, so that a backend never sees two calls at once.
class PagePool {
 public:
  explicit PagePool(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}

  Backend& backend() { return *backend_; }
  int take();
  void give_back(const int* pages, size_t n_pages);
  void step_begins();
  void step_ended();
  int pages_in_use();  // pages that sequences hold, or have dropped during a step that still runs

 private:
  void release(const int* pages, size_t n_pages);

  std::unique_ptr<Backend> backend_;
  std::mutex mutex_;
  bool in_step_ = false;
  int in_use_ = 0;
  std::vector<int> returned_;  // during a step
};

class Sequence {
 public:
  explicit Sequence(std::shared_ptr<PagePool> pool) : pool_(std::move(pool)) {}
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  int n_past() const;
  std::vector<int32_t> tokens() const;
  int prompt_len() const;
  void set_prompt_len(int n);
  // Keeps the first n tokens. std::invalid_argument when n is not in 0 … n_past or a step is running with it.
  void truncate(int n);
  // Gives everything back; a closed sequence cannot be used again.
  void close();

  bool belongs_to(const PagePool& pool) const { return pool_.get() == &pool; }

  // The three moments of a step; only forward.cpp calls them. After prepare(), pages() covers n_new more tokens and the
  // sequence refuses to change until commit() or abandon(), which gives those pages back.
  void prepare(int n_new);
  void commit(const int32_t* new_tokens, int n_new) noexcept;
  void abandon() noexcept;
  const std::vector<int32_t>& history() const { return tokens_; }  // only between prepare and commit
  const std::vector<int>& pages() const { return pages_; }

 private:
  void check_idle() const;
  void keep_pages(size_t n_pages);

  std::shared_ptr<PagePool> pool_;
  mutable std::mutex mutex_;  // guards what follows; held for moments only, never across a call into Python
  std::vector<int32_t> tokens_;
  std::vector<int> pages_;  // pages_[i] holds positions i * kPageTok …
  int prompt_len_ = 0;
  bool in_step_ = false;
  bool closed_ = false;
};

}  // namespace pyllama
