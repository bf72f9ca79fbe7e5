// Large tensors in pages of 2 MiB that go from one to the next.
//
// A training step frees activations while it makes gradients. On a heap a gradient seldom fits into the gaps that it
// finds, so that both take room of their own, and later the optimizer's moments lie between them: of AdamW's step a
// fifth of the memory held nothing. Here whatever is free is enough, wherever it lies: Linux moves a page to another
// address without touching what is in it (mremap), which takes microseconds. Pages stay, until somebody asks for them.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kWaste = 8;       // a tensor whose last page would be emptier than this share of it stays on the heap
constexpr size_t kMost = 1 << 14;  // pages: Linux keeps a moved one as a mapping of its own, of which it allows 65,530

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

class Pages {
 public:
  // Room for so many pages in a row; null where the system has none.
  void* take(size_t pages) {
    const std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t first = fitting(pages);
    if (!first && !(first = gathered(pages))) return nullptr;
    taken_[at(first)] = pages;
    return at(first);
  }

  // Whether it came from here.
  bool give(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(pointer);
    if (found == taken_.end()) return false;
    const size_t pages = found->second;
    taken_.erase(found);
    add(reinterpret_cast<uintptr_t>(pointer), pages);
    return true;
  }

  // What is free goes back to the system; its addresses stay, and find fresh pages when they are used again.
  void give_back() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [first, count] : free_)
      for (size_t page = 0; page < count; ++page) madvise(at(first + page * kPage), kPage, MADV_DONTNEED);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  using Runs = std::map<uintptr_t, size_t>;

  // The shortest free run that is long enough, or 0.
  uintptr_t fitting(size_t pages) {
    auto best = free_.end();
    for (auto run = free_.begin(); run != free_.end(); ++run)
      if (run->second >= pages && (best == free_.end() || run->second < best->second)) best = run;
    if (best == free_.end()) return 0;
    const uintptr_t first = best->first;
    remove(best, pages);
    return first;
  }

  // New addresses for free pages, the shortest runs first, so that long ones stay whole; what is missing is fresh.
  uintptr_t gathered(size_t pages) {
    const uintptr_t first = reserve(pages);
    size_t have = 0;
    while (first && have < pages && all_ <= kMost && !free_.empty()) {
      const auto run = std::min_element(free_.begin(), free_.end(),
                                        [](const auto& one, const auto& other) { return one.second < other.second; });
      const size_t count = moved(run->first, std::min(run->second, pages - have), first + have * kPage);
      if (count == 0) break;
      remove(run, count);
      have += count;
    }
    if (!first || have == pages) return first;
    void* rest = at(first + have * kPage);
    const size_t size = (pages - have) * kPage;
    if (mmap(rest, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
      if (have) add(first, have);
      return 0;
    }
    madvise(rest, size, MADV_HUGEPAGE);
    all_ += pages - have;
    return first;
  }

  // How many pages could be moved: one at a time, since each may be a mapping of its own.
  static size_t moved(uintptr_t from, size_t count, uintptr_t to) {
    for (size_t page = 0; page < count; ++page)
      if (mremap(at(from + page * kPage), kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, at(to + page * kPage)) ==
          MAP_FAILED)
        return page;
    return count;
  }

  // Addresses alone, that begin with a page; 0 where there are none.
  static uintptr_t reserve(size_t pages) {
    const size_t size = (pages + 1) * kPage;
    void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return 0;
    const auto begin = reinterpret_cast<uintptr_t>(found);
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = first + pages * kPage;
    if (first > begin) munmap(at(begin), first - begin);
    if (begin + size > last) munmap(at(last), begin + size - last);
    return first;
  }

  void remove(Runs::iterator run, size_t pages) {
    const auto [first, count] = *run;
    free_.erase(run);
    if (count > pages) free_[first + pages * kPage] = count - pages;
  }

  // A free run, joined to those that it touches.
  void add(uintptr_t first, size_t pages) {
    auto next = free_.lower_bound(first);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second * kPage == first) {
        first = before->first, pages += before->second;
        free_.erase(before);
      }
    }
    if (next != free_.end() && first + pages * kPage == next->first) {
      pages += next->second;
      free_.erase(next);
    }
    free_[first] = pages;
  }

  std::mutex mutex_;
  Runs free_;  // how many pages, by address
  std::unordered_map<void*, size_t> taken_;
  size_t all_ = 0;
};

Pages& pages() {
  static auto* const all = new Pages;  // for good: tensors may be freed after everything else
  return *all;
}

class Allocator final : public c10::Allocator {
 public:
  explicit Allocator(c10::Allocator* heap) : heap_(heap) {}

  c10::DataPtr allocate(size_t size) override {
    const size_t count = (size + kPage - 1) / kPage;
    if (size < kPage || (count * kPage - size) * kWaste > size) return heap_->allocate(size);
    void* const found = pages().take(count);
    if (!found) return heap_->allocate(size);  // which says what there is too little of
    return {found, found, [](void* pointer) { pages().give(pointer); }, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    static const c10::DeleterFnPtr theirs = heap_->raw_deleter();
    return [](void* pointer) {
      if (!pages().give(pointer)) theirs(pointer);
    };
  }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

 private:
  c10::Allocator* heap_;
};

bool pass_pages_on() {
  static const bool done = [] {
    static auto* const ours = new Allocator(c10::GetCPUAllocator());  // for good, as the pages
    c10::SetCPUAllocator(ours);
    // A child that is forked meanwhile must not find the pages locked by a thread that it does not have.
    pthread_atfork([] { pages().lock(); }, [] { pages().unlock(); }, [] { pages().unlock(); });
    return true;
  }();
  return done;
}

void give_pages_back() { pages().give_back(); }

}  // namespace

#else

namespace {
bool pass_pages_on() { return false; }
void give_pages_back() {}
}  // namespace

#endif

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def("pass_pages_on() -> bool", pass_pages_on);
  library.def("give_pages_back() -> ()", give_pages_back);
}
