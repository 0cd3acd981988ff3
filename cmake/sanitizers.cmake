# STAGECOACH_SANITIZE: empty, "address" (with undefined), "thread" or "fuzz" (clang); set by the presets.
set(STAGECOACH_SANITIZE "" CACHE STRING "empty, address, thread or fuzz")
add_library(house_sanitizers INTERFACE)
if(STAGECOACH_SANITIZE STREQUAL "address")
  # CAF's and libstdc++'s headers bind null references in places (see docs of CAF 0.17), hence -fno-sanitize=null.
  set(flags -fsanitize=address,undefined -fno-sanitize=null,vptr -fno-sanitize-recover=undefined
            -fno-omit-frame-pointer)
elseif(STAGECOACH_SANITIZE STREQUAL "fuzz")
  set(flags -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
            -fno-omit-frame-pointer -Wno-unused-command-line-argument)
elseif(STAGECOACH_SANITIZE STREQUAL "thread")
  set(flags -fsanitize=thread -fno-omit-frame-pointer)
endif()
if(flags)
  target_compile_options(house_sanitizers INTERFACE ${flags})
  target_link_options(house_sanitizers INTERFACE ${flags})
endif()
